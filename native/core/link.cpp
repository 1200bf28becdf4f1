// SPDX-License-Identifier: Apache-2.0
#include "link.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "core.h"
#include "guarded.h"
#include "pieces.h"
#include "rows.h"

namespace portakv {
namespace {

// --- CUDA's driver, as cuda.h declares it -----------------------------------------------------

using Handle = void *;  // of a stream or an event

// CUDA_MEMCPY2D.
struct Copy2D {
  struct End {
    uint64_t x;
    uint64_t y;
    uint64_t kind;  // CUmemorytype: 1 the host's, 2 a device's
    uint64_t host;
    uint64_t device;
    uint64_t array;
    uint64_t pitch;
  };
  End src;
  End dst;
  uint64_t width;
  uint64_t height;
};
static_assert(sizeof(Copy2D) == 128, "as cuda.h declares it");

// CUmemcpyAttributes.
struct BatchAttributes {
  uint32_t order;         // of accesses to the source: 1, in the stream's
  uint32_t locations[4];  // which only memory that can migrate has
  uint32_t flags;         // 1: prefer to overlap with compute
};

constexpr int kOutOfMemory = 2;       // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kNotSupported = 801;    // CUDA_ERROR_NOT_SUPPORTED
constexpr unsigned kEveryContext = 1;  // CU_MEMHOSTALLOC_PORTABLE
constexpr unsigned kAtLeast = 0;       // CU_STREAM_WAIT_VALUE_GEQ
constexpr unsigned kNoTiming = 2;      // CU_EVENT_DISABLE_TIMING
constexpr int kThisThread = 1;         // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr size_t kMostStreams = 256;   // whose bytes in a row are known

// Words: addresses in this order; 0 for a function that the driver lacks.
struct Driver {
  int (*copy)(uint64_t dst, uint64_t src, size_t nbytes, Handle stream);
  int (*copy_rows)(const Copy2D *rows, Handle stream);
  // cuMemcpyBatchAsync_v2 of CUDA 13.
  int (*batch)(const int64_t *dst, const int64_t *src, const int64_t *nbytes, size_t number,
               const BatchAttributes *attributes, const size_t *first, size_t several,
               Handle stream);
  // cuMemcpyBatchAsync of CUDA 12.8, which also has the position of the failed copy.
  int (*old_batch)(const int64_t *dst, const int64_t *src, const int64_t *nbytes, size_t number,
                   const BatchAttributes *attributes, const size_t *first, size_t several,
                   size_t *failed, Handle stream);
  int (*wait_value)(Handle stream, uint64_t address, uint32_t value, unsigned flags);
  int (*allocate)(void **address, size_t nbytes, unsigned flags);
  int (*exchange_capture_mode)(int *mode);
  int (*create_event)(Handle *event, unsigned flags);
  int (*destroy_event)(Handle event);
  int (*record)(Handle event, Handle stream);
  int (*wait)(Handle stream, Handle event, unsigned flags);
  int (*query)(Handle stream);
};

Handle handle_of(int64_t word) { return reinterpret_cast<Handle>(word); }

// The legacy default stream, by both of its handles.
bool legacy(int64_t stream) { return stream == 0 || stream == 1; }

// A call that failed.
struct Refused {
  int64_t code;
  int64_t what;
  int64_t values[2];
};

}  // namespace
}  // namespace portakv

using namespace portakv;

struct portakv_link {
  Driver driver;
  std::mutex mutex;  // of all members below
  // By stream: the bytes that crossed since its last rest.
  std::unordered_map<int64_t, int64_t> in_a_row;
  uint32_t *word = nullptr;  // for rests; allocated before the first one, and never freed
  bool rests = true;         // until the driver reports that the device has no such wait
  Handle event = nullptr;    // between the legacy default stream and the one that replaces it

  bool batches() const { return driver.batch != nullptr || driver.old_batch != nullptr; }
};

namespace portakv {
namespace {

void check(int64_t code, int64_t what, int64_t first = 0, int64_t second = 0) {
  if (code != 0) throw Refused{code, what, {first, second}};
}

// --- Pieces -----------------------------------------------------------------------------------

// Plain copies in columns.
struct Plain {
  const int64_t *dst;
  const int64_t *src;
  const int64_t *width;
  int64_t number;
};

// Plain copies that a batch takes, in columns of their own.
struct PlainColumns {
  std::vector<int64_t> dst;
  std::vector<int64_t> src;
  std::vector<int64_t> width;

  void add(const Piece &piece) {
    dst.push_back(piece.dst);
    src.push_back(piece.src);
    width.push_back(piece.width);
  }
  Plain plain() const {
    return {dst.data(), src.data(), width.data(), static_cast<int64_t>(dst.size())};
  }
};

// Pieces in columns; the last three are null if all pieces are plain copies.
struct Listed {
  Plain plain;
  const int64_t *height;
  const int64_t *dst_pitch;
  const int64_t *src_pitch;

  int64_t number() const { return plain.number; }
  Piece operator[](int64_t i) const {
    const int64_t width = plain.width[i];
    if (height == nullptr) return {plain.dst[i], plain.src[i], width, 1, width, width};
    return {plain.dst[i], plain.src[i], width, height[i], dst_pitch[i], src_pitch[i]};
  }
};

// Pass a piece to `out` in parts of `most` bytes at most: cut between rows, single rows anywhere.
template <class Out>
void cut_piece(const Piece &piece, int64_t most, Out &&out) {
  if (piece.width * piece.height <= most) {
    out(piece);
    return;
  }
  const int64_t high = std::max<int64_t>(1, most / piece.width);  // rows of a part
  for (int64_t row = 0; row < piece.height; row += high) {
    const int64_t rows = std::min(high, piece.height - row);
    const int64_t dst = piece.dst + row * piece.dst_pitch;
    const int64_t src = piece.src + row * piece.src_pitch;
    if (rows > 1) {
      out(Piece{dst, src, piece.width, rows, piece.dst_pitch, piece.src_pitch});
      continue;
    }
    for (int64_t at = 0; at < piece.width; at += most) {
      const int64_t part = std::min(most, piece.width - at);
      out(Piece{dst + at, src + at, part, 1, part, part});
    }
  }
}

// Puts pieces on a stream of the link, with rests.
class Submission {
 public:
  Submission(portakv_link &link, const Crossing &crossing)
      : link_(link), crossing_(crossing), rules_(crossing.rules) {}

  void submit(const Listed &pieces) {
    const int64_t number = pieces.number();
    int64_t nbytes = 0;
    for (int64_t i = 0; i < number; i++) {
      nbytes += pieces.plain.width[i] * (pieces.height == nullptr ? 1 : pieces.height[i]);
    }
    const bool many = link_.batches() && number >= rules_.least;
    if (pieces.height == nullptr && nbytes <= rules_.in_a_row && many) {
      batched(pieces.plain);
      return;
    }
    std::vector<Piece> each;
    each.reserve(static_cast<size_t>(number));
    int64_t plain = 0;
    const auto add = [&](const Piece &piece) {
      each.push_back(piece);
      plain += piece.height == 1;
    };
    for (int64_t i = 0; i < number; i++) {
      cut_piece(pieces[i], nbytes > rules_.in_a_row ? rules_.in_a_row : INT64_MAX, add);
    }
    if (!link_.batches() || plain < rules_.least) {
      separate(each);
      return;
    }
    PlainColumns columns;
    std::vector<Piece> rows;
    for (const Piece &piece : each) {
      if (piece.height == 1) {
        columns.add(piece);
      } else {
        rows.push_back(piece);
      }
    }
    separate(rows);
    batched(columns.plain());
  }

 private:
  // Pass the ranges of pieces, in their order, that have no more bytes than cross in a row.
  template <class Bytes, class Out>
  void portions(int64_t number, Bytes &&bytes_of, Out &&out) const {
    int64_t first = 0;
    while (first < number) {
      int64_t nbytes = bytes_of(first);
      int64_t past = first + 1;
      for (; past < number && nbytes + bytes_of(past) <= rules_.in_a_row; past++) {
        nbytes += bytes_of(past);
      }
      out(first, past, nbytes);
      first = past;
    }
  }

  // Copy pieces, each by a call.
  void separate(const std::vector<Piece> &pieces) {
    const auto bytes_of = [&](int64_t i) {
      const Piece &piece = pieces[static_cast<size_t>(i)];
      return piece.width * piece.height;
    };
    portions(static_cast<int64_t>(pieces.size()), bytes_of,
             [&](int64_t first, int64_t past, int64_t nbytes) {
               pass(crossing_.stream, nbytes);
               for (int64_t i = first; i < past; i++) copy(pieces[static_cast<size_t>(i)]);
               begun_ = true;
             });
  }

  // Copy plain copies in batches; the legacy default stream waits for another one that does.
  void batched(const Plain &pieces) {
    if (!legacy(crossing_.stream)) {
      batched_on(crossing_.stream, pieces);
      return;
    }
    follow(crossing_.aside, crossing_.stream);
    try {
      batched_on(crossing_.aside, pieces);
    } catch (...) {
      follow(crossing_.stream, crossing_.aside);
      throw;
    }
    follow(crossing_.stream, crossing_.aside);
  }

  void batched_on(int64_t stream, const Plain &pieces) {
    const auto bytes_of = [&](int64_t i) { return pieces.width[i]; };
    portions(pieces.number, bytes_of, [&](int64_t first, int64_t past, int64_t nbytes) {
      pass(stream, nbytes);
      if (past - first >= rules_.least) {
        batches(stream, pieces, first, past);
      } else {
        for (int64_t i = first; i < past; i++) {
          copy_plain(pieces.dst[i], pieces.src[i], pieces.width[i], stream);
        }
      }
      begun_ = true;
    });
  }

  // The first of several batches is short unless other copies come before it.
  void batches(int64_t stream, const Plain &pieces, int64_t first, int64_t past) {
    static const BatchAttributes attributes{1, {0, 0, 0, 0}, 1};
    static const size_t from_first = 0;
    int64_t most = begun_ ? rules_.most : rules_.first;
    while (first < past) {
      const int64_t number = std::min(most, past - first);
      const size_t count = static_cast<size_t>(number);
      const int64_t *dst = pieces.dst + first;
      const int64_t *src = pieces.src + first;
      const int64_t *width = pieces.width + first;
      const Handle on = handle_of(stream);
      const Driver &driver = link_.driver;
      size_t failed = 0;
      int error = 0;
      if (driver.batch != nullptr) {
        error = driver.batch(dst, src, width, count, &attributes, &from_first, 1, on);
      } else {
        error = driver.old_batch(dst, src, width, count, &attributes, &from_first, 1, &failed, on);
      }
      check(error, PORTAKV_LINK_BATCH, number);
      first += number;
      most = std::min(rules_.growth * most, rules_.most);
    }
  }

  void copy(const Piece &piece) {
    if (piece.height == 1) {
      copy_plain(piece.dst, piece.src, piece.width, crossing_.stream);
      return;
    }
    const auto end = [](int64_t address, bool at_host, int64_t pitch) {
      Copy2D::End result{};
      result.kind = at_host ? 1 : 2;
      (at_host ? result.host : result.device) = static_cast<uint64_t>(address);
      result.pitch = static_cast<uint64_t>(pitch);
      return result;
    };
    const bool down = crossing_.to_device == 0;
    const Copy2D rows{end(piece.src, !down, piece.src_pitch), end(piece.dst, down, piece.dst_pitch),
                      static_cast<uint64_t>(piece.width), static_cast<uint64_t>(piece.height)};
    check(link_.driver.copy_rows(&rows, handle_of(crossing_.stream)), PORTAKV_LINK_COPY,
          piece.height, piece.width);
  }

  void copy_plain(int64_t dst, int64_t src, int64_t width, int64_t stream) {
    check(link_.driver.copy(static_cast<uint64_t>(dst), static_cast<uint64_t>(src),
                            static_cast<size_t>(width), handle_of(stream)),
          PORTAKV_LINK_COPY, 1, width);
  }

  // Count bytes that are about to cross on a stream, after a rest if they are too many in a row.
  void pass(int64_t stream, int64_t nbytes) {
    const std::lock_guard<std::mutex> lock(link_.mutex);
    if (link_.in_a_row.size() >= kMostStreams && link_.in_a_row.count(stream) == 0) {
      link_.in_a_row.clear();
    }
    int64_t &crossed = link_.in_a_row[stream];
    if (crossed > 0 && crossed + nbytes > rules_.in_a_row) {
      crossed = 0;
      rest(stream);
    }
    crossed += nbytes;
  }

  // Let copies of other streams in between; do nothing while no memory can be pinned, or if the
  // device has no wait for a word. The caller holds the mutex.
  void rest(int64_t stream) {
    if (!link_.rests) return;
    if (link_.word == nullptr) allocate_word();
    if (link_.word == nullptr) return;
    const int error = link_.driver.wait_value(handle_of(stream),
                                              reinterpret_cast<uint64_t>(link_.word), 0, kAtLeast);
    link_.rests = error != kNotSupported;
    if (link_.rests) check(error, PORTAKV_LINK_REST);
  }

  void allocate_word() {
    // Ignoring captures of other threads: no copy by a link is issued inside a capture.
    int mode = kThisThread;
    const auto exchange = link_.driver.exchange_capture_mode;
    if (exchange != nullptr) exchange(&mode);
    void *word = nullptr;
    const int error = link_.driver.allocate(&word, sizeof *link_.word, kEveryContext);
    if (exchange != nullptr) exchange(&mode);
    if (error == kOutOfMemory) return;
    check(error, PORTAKV_LINK_WORD);
    link_.word = static_cast<uint32_t *>(word);
    *link_.word = 0;
  }

  // Make a stream wait for the present work of another one.
  void follow(int64_t stream, int64_t before) {
    const std::lock_guard<std::mutex> lock(link_.mutex);
    const Driver &driver = link_.driver;
    if (link_.event == nullptr) {
      check(driver.create_event(&link_.event, kNoTiming), PORTAKV_LINK_EVENT);
    }
    check(driver.record(link_.event, handle_of(before)), PORTAKV_LINK_EVENT);
    check(driver.wait(handle_of(stream), link_.event, 0), PORTAKV_LINK_EVENT);
  }

  portakv_link &link_;
  const Crossing &crossing_;
  const SubmitRules &rules_;
  bool begun_ = false;  // pieces were submitted, so that the link does not wait for the next call
};

// Lists pieces of copies, each time in the same memory.
class PieceList {
 public:
  Listed list(const Plan &plan, const PiecesRequest &request) {
    int64_t room = std::max<int64_t>(1, product(request.count / plan.unit, plan.runs));
    while (true) {
      if (room > room_) {
        words_.reset(new int64_t[static_cast<size_t>(6 * room + 1)]);
        room_ = room;
      }
      int64_t *out = words_.get();
      Columns columns(out, room_);
      write_pieces(plan, request, columns);
      const int64_t number = columns.end();
      if (number > room_) {
        room = number;
        continue;
      }
      const int64_t *at = out + 1;
      const Plain plain{at, at + room_, at + 2 * room_, number};
      if (out[0] == 0) return {plain, nullptr, nullptr, nullptr};
      return {plain, at + 3 * room_, at + 4 * room_, at + 5 * room_};
    }
  }

 private:
  std::unique_ptr<int64_t[]> words_;
  int64_t room_ = 0;
};

// --- A copy in slices -------------------------------------------------------------------------

// Some positions of a copy.
struct SliceCut {
  int64_t start;
  int64_t count;
};

// The slices of a copy, and the buffers that they pass through.
struct Slices {
  std::vector<SliceCut> cuts;  // in the order of their moves
  int64_t first;               // the token of a block at which a slice begins in its buffer
  int64_t slots;               // tokens of a buffer
};

// Return the positions of about `target` bytes: a multiple of the quantum, at least one.
int64_t multiple_of(int64_t target, const DenseRows &dense) {
  const int64_t each = product(dense.quantum, dense.nbytes);  // of `tokens` quanta
  return std::max<int64_t>(1, product(target, dense.tokens) / std::max<int64_t>(1, each)) *
         dense.quantum;
}

int64_t bytes_of(int64_t count, const DenseRows &dense) {
  return product(count, dense.nbytes) / dense.tokens;
}

// Return the tokens of a buffer for slices of up to `count` tokens. They are one of few numbers, so
// that buffers seldom grow.
int64_t slots_of(const CutRules &rules, int64_t count, int64_t first) {
  const DenseRows &dense = rules.dense;
  if (dense.slots != 0) {
    if (count + first > dense.slots) throw Malformed("a slice is longer than its buffer");
    return dense.slots;
  }
  int64_t slots = dense.quantum;
  while (slots < count) slots = product(slots, 2);
  slots = std::min(slots, multiple_of(rules.sizes.largest, dense));
  slots = std::max(slots, (count + dense.quantum - 1) / dense.quantum * dense.quantum);
  return slots + (first != 0 ? dense.block : 0);
}

// Cut a copy into slices that grow, in the order of their positions: small slices come first on
// their way down, and last on their way up. `offset`: tokens of the host that are passed over.
Slices cut_slices(const CutRules &rules, int64_t count, int64_t offset, bool idle) {
  const DenseRows &dense = rules.dense;
  const SliceSizes &sizes = rules.sizes;
  Slices slices{{}, offset % dense.block, 0};
  // If the link is busy, nothing waits for the first slice.
  int64_t target = idle ? sizes.smallest : sizes.largest;
  const bool whole = bytes_of(count, dense) <= sizes.whole;
  int64_t most = 0;
  for (int64_t start = 0; start < count;) {
    const int64_t taken = whole ? count : std::min(multiple_of(target, dense), count - start);
    slices.cuts.push_back({start, taken});
    most = std::max(most, taken);
    start += taken;
    target = std::min(target * sizes.growth, sizes.largest);
  }
  if (rules.downward == 0) std::reverse(slices.cuts.begin(), slices.cuts.end());
  slices.slots = slots_of(rules, most, slices.first);
  return slices;
}

// Take buffers for the slices of a copy. Detached, the first slice takes the buffer after the last
// slice of the copy before.
SliceOrder order_of(const StagingBuffers &staging, int64_t slices, int64_t downward) {
  auto *const turn = reinterpret_cast<BufferTurn *>(staging.turn);
  const bool alone = slices == 1 && staging.detached == 0;
  const SliceOrder order{slices,   staging.number, turn->first,     turn->used,
                         downward, alone,          staging.detached};
  if (staging.detached == 0) return order;
  for (int64_t slice = 0; slice < std::min(slices, staging.number); slice++) {
    turn->used |= int64_t{1} << buffer_of(order, slice);
  }
  turn->first = (turn->first + slices) % staging.number;
  return order;
}

// A copy of rows between a device and the host, from its checked sides to the driver.
class RowsCrossing {
 public:
  RowsCrossing(portakv_link &link, const int64_t *words) : link_(link) {
    std::memcpy(&call_, words, sizeof call_);
    std::memcpy(&plan_, reinterpret_cast<const void *>(call_.plan), sizeof plan_);
    std::memcpy(&copy_, reinterpret_cast<const void *>(call_.copy), sizeof copy_);
    crosses_ = read_plan(reinterpret_cast<const int64_t *>(plan_.plan));
    const auto *const end = reinterpret_cast<const portakv_copy_end *>(call_.end);
    if (end != nullptr && end->event != nullptr) end_ = end;
  }

  // Submit the copy, in slices by dense rows or as its pieces, and record its end.
  void run(portakv_link_fault &fault) {
    if (plan_.kernels == 0) {
      PiecesRequest request = request_of(copy_.src, copy_.dst, copy_.count);
      request.merged = plan_.merged;
      request.edged = call_.uncrossed.edged;
      submit(request, call_.stream);
    } else {
      in_slices(fault);
    }
    if (end_ == nullptr) return;
    check(end_->record(end_->event, handle_of(call_.stream)), PORTAKV_LINK_EVENT);
  }

 private:
  bool down() const { return plan_.cut.downward != 0; }
  const Positions &host() const { return down() ? copy_.dst : copy_.src; }

  void in_slices(portakv_link_fault &fault) {
    std::memcpy(&staging_, reinterpret_cast<const void *>(call_.staging), sizeof staging_);
    const DenseRows &dense = plan_.cut.dense;
    const bool idle = bytes_of(copy_.count, dense) <= plan_.cut.sizes.whole || at_rest();
    slices_ = cut_slices(plan_.cut, copy_.count, host().offset, idle);
    const int64_t room = bytes_of(slices_.slots, dense);
    if (room > staging_.nbytes) throw Refused{PORTAKV_LINK_ROOM, 0, {room, slices_.slots}};
    stage_ = read_plan(reinterpret_cast<const int64_t *>(plan_.stage));
    std::memcpy(&options_, reinterpret_cast<const void *>(plan_.options), sizeof options_);

    const int64_t number = static_cast<int64_t>(slices_.cuts.size());
    order_ = order_of(staging_, number, plan_.cut.downward);
    int64_t at = 0;
    const auto execute = [&](const ScheduleStep &step) {
      const int error = perform(step);
      check(error, failing_);
    };
    try {
      first_steps(order_, execute);
      for (; at < number; at++) slice_steps(order_, at, execute);
      at = number - 1;
      by_end_ = end_ != nullptr && order_.alone == 0;
      last_steps(order_, execute);
      if (by_end_) end_ = nullptr;  // it is recorded
    } catch (...) {
      by_end_ = false;
      failed_steps(order_, [&](const ScheduleStep &step) { perform(step); });
      fault.slice = slices_.cuts[static_cast<size_t>(at)].count;
      throw;
    }
  }

  // Return true if nothing is under way on the stream of slices.
  bool at_rest() {
    return link_.driver.query(handle_of(staging_.link)) == 0;
  }

  // Execute a step of the schedule; return the driver's answer.
  int perform(const ScheduleStep &step) {
    const Driver &driver = link_.driver;
    const int64_t streams[] = {call_.stream, staging_.half, staging_.link, call_.before};
    const int64_t stream = streams[step.stream];
    const bool by_end = by_end_ && step.number == order_.buffers + kEnded;
    const auto event = [&] {
      if (by_end) return end_->event;
      return handle_of(reinterpret_cast<const int64_t *>(staging_.events)[step.number]);
    };
    failing_ = PORTAKV_LINK_EVENT;
    switch (step.kind) {
      case kWait:
        return driver.wait(handle_of(stream), event(), 0);
      case kRecord:
        return (by_end ? end_->record : driver.record)(event(), handle_of(stream));
      case kStage:
        failing_ = PORTAKV_LINK_STAGE;
        return launch(step.number, handle_of(stream));
      case kCross:
        cross(step.number, stream);
        return 0;
    }
    return 0;
  }

  int64_t buffer(int64_t slice) const {
    return reinterpret_cast<const int64_t *>(staging_.memory)[buffer_of(order_, slice)];
  }

  // Launch the kernels between the device's rows and a buffer for one slice.
  int launch(int64_t slice, Handle stream) {
    const SliceCut &cut = slices_.cuts[static_cast<size_t>(slice)];
    const int64_t address = buffer(slice);
    portakv_rows_side rows = copy_.rows;
    rows.offset += cut.start;
    portakv_rows_side dense{};
    dense.addresses = &address;
    dense.offset = slices_.first;
    dense.slots = slices_.slots;
    const auto &kernels = *reinterpret_cast<const portakv_kernels *>(plan_.kernels);
    return static_cast<int>(run_rows(kernels, stage_, options_, down() ? rows : dense,
                                     down() ? dense : rows, cut.count, 0, stream));
  }

  // Submit the pieces of one slice.
  void cross(int64_t slice, int64_t stream) {
    const SliceCut &cut = slices_.cuts[static_cast<size_t>(slice)];
    Positions dense{};
    dense.addresses = buffer(slice);
    dense.entries = 1;
    dense.step = 1;
    dense.offset = slices_.first;
    dense.slots = slices_.slots;
    Positions rows = host();
    rows.offset += cut.start;
    PiecesRequest request =
        request_of(down() ? dense : rows, down() ? rows : dense, cut.count);
    (down() ? request.src_whole : request.dst_whole) = 0;
    request.merged = 1;
    request.edged = 1;
    submit(request, stream);
  }

  PiecesRequest request_of(const Positions &src, const Positions &dst, int64_t count) const {
    PiecesRequest request{};
    request.src = src;
    request.dst = dst;
    request.count = count;
    request.limits = plan_.limits;
    request.src_whole = copy_.src_whole;
    request.dst_whole = copy_.dst_whole;
    request.registered = call_.uncrossed.registered;
    request.src_edges = call_.uncrossed.edges[0];
    request.dst_edges = call_.uncrossed.edges[1];
    return request;
  }

  void submit(const PiecesRequest &request, int64_t stream) {
    const Crossing crossing{plan_.cut.downward == 0, stream, call_.aside, plan_.rules};
    Submission(link_, crossing).submit(pieces_.list(crosses_, request));
  }

  portakv_link &link_;
  CrossingCopy call_;
  CrossingPlan plan_;
  CheckedCopy copy_;
  Plan crosses_;
  PieceList pieces_;
  // Of a copy in slices.
  StagingBuffers staging_{};
  Slices slices_{};
  SliceOrder order_{};
  Plan stage_;  // of the device
  RowsOptions options_{};
  const portakv_copy_end *end_ = nullptr;  // whose event is to be recorded
  bool by_end_ = false;  // that event is the schedule's last one
  int64_t failing_ = 0;
};

// Run a body; write what it refused. Return 0, or the code.
template <class Body>
int64_t judged(portakv_link_fault *fault, Body &&body) {
  std::memset(fault, 0, sizeof *fault);
  fault->code = guarded([&]() -> int64_t {
    try {
      body();
    } catch (const Refused &refused) {
      fault->what = refused.what;
      std::memcpy(fault->values, refused.values, sizeof fault->values);
      return refused.code;
    } catch (const NeedsEdges &) {
      return PORTAKV_RUNS_EDGES;
    }
    return 0;
  });
  return fault->code;
}

}  // namespace
}  // namespace portakv

extern "C" {

int64_t portakv_link_schedule(const int64_t *words, int64_t *out, int64_t room) {
  return guarded([&] {
    SliceOrder order;
    std::memcpy(&order, words, sizeof order);
    if (order.slices < 0 || order.buffers < 1 || order.buffers > 62 || order.first < 0) {
      throw Malformed("an order of slices has other numbers");
    }
    Writer writer(out, room);
    std::vector<ScheduleStep> group;
    const auto add = [&](const ScheduleStep &step) { group.push_back(step); };
    const auto write = [&] {
      writer.word(static_cast<int64_t>(group.size()));
      for (const ScheduleStep &step : group) {
        writer.word(step.kind);
        writer.word(step.stream);
        writer.word(step.number);
      }
      group.clear();
    };
    first_steps(order, add);
    write();
    for (int64_t slice = 0; slice < order.slices; slice++) {
      slice_steps(order, slice, add);
      write();
    }
    last_steps(order, add);
    write();
    failed_steps(order, add);
    write();
    return writer.count();
  });
}

int64_t portakv_link_cut(const int64_t *words, int64_t count, int64_t offset, int64_t idle,
                         int64_t *out, int64_t room) {
  return guarded([&] {
    CutRules rules;
    std::memcpy(&rules, words, sizeof rules);
    const Slices slices = cut_slices(rules, count, offset, idle != 0);
    Writer writer(out, room);
    writer.word(slices.slots);
    for (const SliceCut &cut : slices.cuts) {
      writer.word(cut.start);
      writer.word(cut.count);
    }
    return writer.count();
  });
}

portakv_link *portakv_link_open(const int64_t *functions) {
  auto *link = new (std::nothrow) portakv_link();
  static_assert(sizeof(Driver) == 12 * sizeof(int64_t), "functions are words");
  if (link != nullptr) std::memcpy(static_cast<void *>(&link->driver), functions, sizeof(Driver));
  return link;
}

void portakv_link_close(portakv_link *link) {
  if (link->event != nullptr) link->driver.destroy_event(link->event);
  delete link;
}

int64_t portakv_link_submit(portakv_link *link, const int64_t *const *columns, int64_t number,
                            const int64_t *words, portakv_link_fault *fault) {
  return judged(fault, [&] {
    Crossing crossing;
    std::memcpy(&crossing, words, sizeof crossing);
    const Listed pieces{{columns[0], columns[1], columns[2], number},
                        columns[3], columns[4], columns[5]};
    Submission(*link, crossing).submit(pieces);
  });
}

int64_t portakv_link_rows(portakv_link *link, const int64_t *words, portakv_link_fault *fault) {
  return judged(fault, [&] { RowsCrossing(*link, words).run(*fault); });
}

}  // extern "C"
