// SPDX-License-Identifier: Apache-2.0
// One copy by kernels of a device, from what its caller passes to the launch: tensors and ids are
// read and checked, the copy is planned and launched. Nothing is kept from call to call.
//
// What a call does not fit ends it before anything is launched: Python then finds the reason and
// its sentence, or copies otherwise.
#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <tuple>
#include <type_traits>

#include "core.h"
#include "few.h"
#include "form.h"
#include "ids.h"
#include "link.h"
#include "pick.h"
#include "plan.h"
#include "rows.h"
#include "tensors.h"
#include "view.h"
#include "writable.h"

namespace portakv {
namespace {

// This file does not make such a copy.
struct Otherwise {};

void require(bool fits) {
  if (!fits) throw Otherwise();
}

// One side of a copy.
struct End {
  const int64_t *form;
  const int64_t *dtypes;
  const Span *spans;
  size_t span_count;
  bool table_on_device;
  portakv_rows_side rows;  // its ids are set by `place`
  int64_t step;            // tokens of an id, 0 without ids
};

End end_of(const portakv_copy_view &view) {
  static_assert(sizeof(Span) == 2 * sizeof(int64_t), "a span is two words");
  End end{};
  end.form = view.form;
  end.dtypes = view.dtypes;
  end.spans = reinterpret_cast<const Span *>(view.spans);
  end.span_count = static_cast<size_t>(view.span_count);
  end.table_on_device = view.table_on_device != 0;
  end.rows.addresses = view.addresses;
  end.rows.table = view.table;
  end.rows.slots = view.slots;
  return end;
}

// --- Ids --------------------------------------------------------------------------------------

// Ids as a caller passes them. Without any, `list.data` is null.
struct Ids {
  portakv_ids list;
  bool on_host;
};

// Memory of one call for ids of both sides that do not lie next to each other in memory.
class Lists {
 public:
  int64_t *take(int64_t count) {
    Few<int64_t, 256> &ids = ids_[taken_++];
    ids.resize(static_cast<size_t>(count));
    return ids.data();
  }

 private:
  Few<int64_t, 256> ids_[2];
  size_t taken_ = 0;
};

Ids read_ids(const Asker &ask, Object ids, DlDevice device, Lists &lists) {
  Ids result{};
  const Object type = ask.python.type(ids);
  ask.python.release(type);  // the ids hold it
  if (type == ask.python.list_type) {
    const int64_t length = ask.python.list_size(ids);
    require(length > 0);  // without memory an empty list would look like no ids
    int64_t *out = lists.take(length);
    const portakv_ids_list_call call{ids, out, length};
    require(portakv_ids_read_list(&call) == 0);
    result.list = {out, 8, 8, length, 0, 0, 0};
    result.on_host = true;
    return result;
  }
  const DlTensor facts = ask.describe(ids, false);
  require(facts.ndim == 1 && facts.dtype.code == kDlInt && facts.dtype.lanes == 1);
  require(facts.dtype.bits == 32 || facts.dtype.bits == 64);
  require(!ask.is_neg(ids));
  const int64_t width = facts.dtype.bits / 8;
  const int64_t length = facts.shape[0];
  require(length > 0);
  const int64_t stride = facts.strides ? product(width, facts.strides[0]) : width;
  // A storage can have been resized.
  const int64_t first = product(width, ask.storage_offset(ids));
  const int64_t reach = sum(first, sum(product(length - 1, stride), width));
  require(stride >= 0 && reach <= ask.storage_bytes(ids));
  result.list = {reinterpret_cast<const void *>(begin_of(facts)), width, stride, length, 0, 0, 0};
  result.on_host = is_host(facts.device.type);
  if (!result.on_host) {
    require(facts.device.type == device.type && facts.device.id == device.id);
    require(stride == width || length == 1);
  }
  return result;
}

// What a check of both sides' ids found.
struct Found {
  bool guarded = false;  // a kernel judges ids of the device
  bool skips = false;    // ids of the host skip positions
};

// Check the ids that the positions of one end use, or without ids the range of the view.
void check(Ids &ids, int64_t step, int64_t offset, int64_t count, bool distinct, End &end,
           Found &found) {
  portakv_ids &list = ids.list;
  list.step = step;
  list.offset = offset;
  list.count = count;
  end.rows.offset = offset;
  if (list.data == nullptr) {
    require(offset >= 0 && offset <= end.rows.slots && count <= end.rows.slots - offset);
    return;
  }
  end.step = step;
  require(step > 0 && offset >= 0);
  require(count <= product(list.length, step) - offset);
  if (!ids.on_host) {
    found.guarded = true;
    return;
  }
  const int code = check_ids(list, end.rows.slots, distinct, nullptr);
  require(code >= 0);
  found.skips = found.skips || code == PORTAKV_IDS_NEGATIVE;
}

// Tell an end where its checked ids lie.
void place(const Ids &ids, Lists &lists, End &end) {
  const portakv_ids &list = ids.list;
  if (list.data == nullptr) return;
  end.rows.ids = reinterpret_cast<intptr_t>(list.data);
  end.rows.wide = list.width == 8 ? PORTAKV_WIDE_64 : PORTAKV_WIDE_32;
  if (!ids.on_host) return;
  require(end.rows.slots / list.step <= INT32_MAX);
  if (list.stride != list.width && list.length != 1) {
    const Places used(list);
    int64_t *const out = lists.take(used.count());
    with_ids(list, [&](const auto &each) {
      for (int64_t at = used.first; at < used.past; at++) out[at - used.first] = each[at];
    });
    end.rows.ids = reinterpret_cast<intptr_t>(out);
    end.rows.wide = PORTAKV_WIDE_64;
    end.rows.offset = list.offset % list.step;
  }
  end.rows.wide += PORTAKV_WIDE_32_HOST - PORTAKV_WIDE_32;
}

// --- Memory -----------------------------------------------------------------------------------

bool overlap(const End &a, const End &b) {
  const End &few = a.span_count < b.span_count ? a : b;
  const End &many = a.span_count < b.span_count ? b : a;
  const Span *past_all = many.spans + many.span_count;
  for (size_t i = 0; i < few.span_count; i++) {
    const Span &span = few.spans[i];
    const Span *after = std::lower_bound(
        many.spans, past_all, span.past,
        [](const Span &each, int64_t address) { return each.first < address; });
    if (after != many.spans && after[-1].past > span.first) return true;
  }
  return false;
}

void check_memory(const portakv_copy_view &view) {
  require(view.watch == nullptr || unchanged(*view.watch));
}

// Tell torch that a view was written.
void raise_versions(const PortakvTorch &torch, const portakv_copy_view &view) {
  for (int64_t n = 0; n < view.version_count; n++) raise_version(torch, view.versions[n]);
}

// Return true if no two elements of a tensor share a byte, as far as its strides show in order.
bool elements_apart(const int64_t *shape, const int64_t *strides, size_t ndim) {
  size_t order[64];
  size_t count = 0;
  for (size_t n = 0; n < ndim && count < 64; n++) {
    if (shape[n] > 1) order[count++] = n;
  }
  std::sort(order, order + count, [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t reach = 1;
  for (size_t i = 0; i < count; i++) {
    const size_t n = order[i];
    if (strides[n] < reach) return false;
    reach = sum(reach, product(shape[n] - 1, strides[n]));
  }
  return ndim <= 64;
}

// A view with one tensor that a copy writes: it alone can be judged without the sentences.
void check_written(const TensorReader &reader) {
  require(!reader.requires_grad());
  const Tensors &tensors = reader.tensors();
  require(tensors.begins.size() == 1);
  const Kind &kind = tensors.kind[0];
  require(elements_apart(tensors.shape(kind), tensors.strides(kind), kind.ndim));
}

// Check that the storages still hold the tensors: they can have been resized.
void check_storages(const TensorReader &reader) {
  const Tensors &tensors = reader.tensors();
  require(reader.view().spans.size() == tensors.begins.size());
  for (size_t n = 0; n < tensors.begins.size(); n++) {
    const Kind &kind = tensors.kind[tensors.kinds[n]];
    int64_t past = tensors.begins[n] + kind.itemsize;
    for (size_t axis = 0; axis < kind.ndim; axis++) {
      const int64_t steps = tensors.shape(kind)[axis] - 1;
      past = sum(past, product(product(steps, tensors.strides(kind)[axis]), kind.itemsize));
    }
    require(past <= tensors.bases[n] + reader.ask().storage_bytes(reader.objects()[n]));
  }
}

// --- Arguments --------------------------------------------------------------------------------

// The arguments of a call, in their order. A number of more than 64 bits throws `Raised`.
class Arguments {
 public:
  Arguments(const Python &python, const Object *first) : python_(python), next_(first) {}

  Object object() { return *next_++; }
  Object next() const { return *next_; }
  int64_t number() { return value_of(*next_++); }
  // Return a number from 0 on that is an integer itself, or `none` for None.
  int64_t position(int64_t none) {
    const Object object = *next_++;
    if (object == python_.none && none != 0) return none;
    const Owned type(python_, python_.type(object));
    const int64_t value = value_of(object);
    require(type.get() == python_.integer_type && value >= 0);
    return value;
  }
  template <typename T>
  T *pointer() {
    return reinterpret_cast<T *>(static_cast<intptr_t>(number()));
  }

 private:
  int64_t value_of(Object object) const {
    const long long value = python_.integer(object);
    if (value == -1 && python_.error()) throw Raised();
    return value;
  }

  const Python &python_;
  const Object *next_;
};

// Write the current stream of a device; return false if another device is current, the stream is
// being captured, or a function failed.
bool name_stream(const portakv_current &of, void **stream) {
  if (of.current_device != nullptr) {
    int current = -1;
    if (of.current_device(&current) != 0 || current != of.device) return false;
  }
  if (of.current_stream(static_cast<int32_t>(of.device), stream) != 0) return false;
  int captured = 0;
  return of.capturing(*stream, &captured) == 0 && captured == 0;
}

// The end of a copy, and the stream of its work: the last arguments of each call.
struct Means {
  portakv_copy_end *at;  // null: there is no event
  portakv_copy_end end;
  void *stream;
  bool named;  // there is a stream

  Means(Arguments &arguments, const Python &python, const portakv_current *current)
      : at(arguments.pointer<portakv_copy_end>()),
        end{},
        stream(nullptr),
        named(true) {
    if (at != nullptr) end = *at;
    if (arguments.next() == python.none) {
      named = current != nullptr && name_stream(*current, &stream);
    } else {
      stream = arguments.pointer<void>();
    }
  }
};

// --- The copy ---------------------------------------------------------------------------------

constexpr int64_t kMostTokens = int64_t{1} << 46;  // that a result holds

// Check that two ends of so many parts share no memory, and that their dtypes fit.
void check_ends(const End &src, const End &dst, size_t parts) {
  require(!overlap(src, dst));
  for (size_t k = 0; k < parts; k++) {
    const int64_t read = src.dtypes[k];
    const int64_t written = dst.dtypes[k];
    require(read == written || read == 0 || written == 0);
  }
}

// Check that a copy moves whole units: what begins or ends inside a unit is copied in parts.
void check_units(const End &src, const End &dst, int64_t count, int64_t unit) {
  for (int64_t tokens :
       {count, src.rows.offset, dst.rows.offset, src.rows.slots, dst.rows.slots}) {
    require(tokens % unit == 0);
  }
}

// Plan a copy between two ends that share no memory.
Plan plan_of(const End &src, const End &dst, int64_t count) {
  require(count > 0 && count < kMostTokens);
  const Form from = read_form(src.form);
  const Form to = read_form(dst.form);
  require(from.parts.size() == to.parts.size());
  check_ends(src, dst, from.parts.size());
  Plan plan;
  Refusal refusal;
  require(make_plan(from, to, src.step, dst.step, 0, plan, refusal));
  check_units(src, dst, count, plan.unit);
  return plan;
}

// Return the result of core.h for so many tokens; `answer`: of a pick, 0 inside a device.
int64_t result_of(int64_t count, int64_t answer, const Found &found) {
  return count << 16 | answer << 2 | int64_t{found.guarded} << 1 | int64_t{found.skips};
}

// A copy by kernels, as it is launched: by then the copy is checked, and no tensor is read.
class KernelLaunch {
 public:
  // Plan a copy between two ends.
  void plan(const portakv_kernels &kernels, const End &src, const End &dst, int64_t count,
            const Found &found, const Means &means, bool by_source = false) {
    kernels_ = &kernels;
    plan_ = plan_of(src, dst, count);
    options_ = {src.step, dst.step, src.table_on_device, dst.table_on_device, by_source};
    src_ = src.rows;
    dst_ = dst.rows;
    count_ = count;
    status_ = found.guarded ? means.end.status : 0;
  }

  // Return 0, the driver's error, or a code.
  int64_t run(const Means &means) const {
    const int64_t error =
        run_rows(*kernels_, plan_, options_, src_, dst_, count_, status_, means.stream);
    if (error != 0 || means.end.event == nullptr) return error;
    return means.end.record(means.end.event, means.stream);
  }

 private:
  const portakv_kernels *kernels_;
  Plan plan_;
  RowsOptions options_;
  portakv_rows_side src_;
  portakv_rows_side dst_;
  int64_t count_;
  uint64_t status_;
};

// Return what core.h says of a copy of so many tokens that was launched with this code.
int64_t launched(int64_t code, int64_t count, const Found &found) {
  if (code > 0) return PORTAKV_COPY_DRIVER - code;
  require(code == 0);
  return result_of(count, 0, found);
}

// Return the layout of chunks of a described tensor.
const int64_t *layout_of(const portakv_chunk_copies &copies, const DlTensor &chunk) {
  const int64_t bytes = itemsize_of(chunk);
  for (size_t power = 0; power < std::size(copies.layouts); power++) {
    if (bytes != int64_t{1} << power) continue;
    require(copies.layouts[power] != nullptr);
    return copies.layouts[power];
  }
  throw Otherwise();
}

// The ends of a copy between rows of caches, by slots, and a chunk from its first token on. The
// members are declared in the order of the arguments.
class ChunkPair {
 public:
  ChunkPair(const Python &python, Arguments &arguments)
      : copies(*arguments.pointer<const portakv_chunk_copies>()),
        store(arguments.number() != 0),
        chunk(arguments.object()),
        ids_(arguments.object()),
        start_(arguments.position(0)),
        end_(arguments.position(kToTheEnd)),
        facts_(Asker(python, *copies.by.torch).describe(chunk, false)),
        layout_(layout_of(copies, facts_)),
        reader(python, *copies.by.torch, layout_) {}

  void read_slots() {
    const DlDevice device = facts_.device;
    require(device.type == copies.caches->device_type && device.id == copies.caches->device_id);
    on_host = is_host(device.type);
    slots = read_ids(reader.ask(), ids_, device, lists);
  }

  // Read and check the chunk, and check the slots and the memory.
  void check() {
    const portakv_copy_view &caches = *copies.caches;
    check_memory(caches);
    reader.read(chunk, facts_);
    require(!layout_.packed);
    if (store) {
      check_written(reader);
    } else {
      require(caches.writable != 0);
    }
    check_storages(reader);

    const View &view = reader.view();
    for (size_t i = 0; i < view.entries.size(); i++) {
      addresses_.push_back(reader.tensors().begins[static_cast<size_t>(view.entries[i])]);
    }
    const Form form = read_form(view.form.data());
    const int64_t *const last = view.form.data() + view.form.size();
    dense.form = view.form.data();
    dense.dtypes = last - form.parts.size();
    dense.spans = view.spans.data();
    dense.span_count = view.spans.size();
    dense.rows.addresses = addresses_.data();
    dense.rows.slots = view.slots;

    const int64_t past = end_ == kToTheEnd ? slots.list.length : end_;
    require(start_ < past && past <= slots.list.length);
    count = past - start_;
    // Without an end, the slots fill the chunk, whose last block may be filled in part.
    const int64_t spare = view.slots - count;
    require(spare >= 0);
    require(end_ != kToTheEnd || spare < std::max<int64_t>(1, form.block_size));

    paged = end_of(caches);
    portakv::check(slots, 1, start_, count, !store, paged, found);
  }

  const End &from() const { return store ? paged : dense; }
  const End &to() const { return store ? dense : paged; }

 private:
  static constexpr int64_t kToTheEnd = PORTAKV_COPY_TO_THE_END;

 public:
  const portakv_chunk_copies &copies;
  const bool store;
  const Object chunk;

 private:
  const Object ids_;
  const int64_t start_;
  const int64_t end_;
  const DlTensor facts_;
  const Bound layout_;
  Few<int64_t, 40> addresses_;

 public:
  Lists lists;
  TensorReader reader;
  int64_t count = 0;
  bool on_host = false;
  Ids slots = {};
  End dense = {};
  End paged = {};
  Found found;
};

// Read a word that a kernel or another thread writes.
int64_t shared_word(const int64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

// Return true if a status word reports an error.
bool any_error(const portakv_words &words) {
  int64_t all = 0;
  for (int64_t n = 0; n < words.count; n++) {
    for (int at = 0; at < PORTAKV_WORDS; at++) all |= shared_word(&words.batches[n][at]);
  }
  return all != 0;
}

class ChunkCopy {
 public:
  ChunkCopy(const Python &python, Arguments arguments)
      : pair_(python, arguments), means_(arguments, python, pair_.copies.by.current) {}

  int64_t prepare() {
    require(!any_error(*pair_.copies.words));
    if (!means_.named) return PORTAKV_COPY_STREAM;
    pair_.read_slots();
    pair_.check();
    place(pair_.slots, pair_.lists, pair_.paged);
    launch_.plan(*pair_.copies.by.kernels, pair_.from(), pair_.to(), pair_.count, pair_.found,
                 means_);
    return 0;
  }

  int64_t run() const { return launch_.run(means_); }

  int64_t finish(int64_t code) {
    const int64_t result = launched(code, pair_.count, pair_.found);
    if (result < 0) return result;
    if (pair_.store) {
      pair_.reader.ask().raise_version(pair_.chunk);
    } else {
      raise_versions(*pair_.copies.by.torch, *pair_.copies.caches);
    }
    return result;
  }

 private:
  ChunkPair pair_;
  const Means means_;
  KernelLaunch launch_;
};

// The ends of a copy between two views, with the ids of each as a caller passes them. The members
// are declared in the order of the arguments.
class Pair {
 public:
  Pair(const Python &python, const PortakvTorch &torch, Arguments &arguments)
      : ask_(python, torch),
        src_(*arguments.pointer<const portakv_copy_view>()),
        dst_(*arguments.pointer<const portakv_copy_view>()),
        src_ids_(arguments.object()),
        dst_ids_(arguments.object()),
        src_step_(arguments.number()),
        dst_step_(arguments.number()),
        src_offset_(arguments.number()),
        dst_offset_(arguments.number()),
        count(arguments.number()) {}

  // Read and check the ids and the memory.
  void check() {
    require(dst_.writable != 0);
    // Across the link the device's kernels read or write memory of the host.
    from_host = is_host(static_cast<int32_t>(src_.device_type));
    to_host = is_host(static_cast<int32_t>(dst_.device_type));
    require(from_host != to_host || from_host || src_.device_id == dst_.device_id);
    require(from_host != to_host || from_host || src_.device_type == dst_.device_type);
    const portakv_copy_view &home = from_host ? dst_ : src_;
    const DlDevice device{static_cast<int32_t>(home.device_type),
                          static_cast<int32_t>(home.device_id)};
    check_memory(src_);
    check_memory(dst_);
    const Object none = ask_.python.none;
    if (src_ids_ != none) read = read_ids(ask_, src_ids_, device, lists_);
    if (dst_ids_ != none) written = read_ids(ask_, dst_ids_, device, lists_);
    if (count == PORTAKV_COPY_TO_THE_END) {
      const bool listed = read.list.data || written.list.data;
      const auto left = [&](const Ids &ids, int64_t step, int64_t slots, int64_t offset) {
        return difference(listed ? product(ids.list.length, step) : slots, offset);
      };
      const int64_t src_tokens = left(read, src_step_, src_.slots, src_offset_);
      const int64_t dst_tokens = left(written, dst_step_, dst_.slots, dst_offset_);
      count = read.list.data || !listed ? src_tokens : dst_tokens;
      const bool both = !listed || (read.list.data && written.list.data);
      require(!both || src_tokens == dst_tokens);
    }
    require(count > 0);
    from = end_of(src_);
    to = end_of(dst_);
    portakv::check(read, src_step_, src_offset_, count, false, from, found);
    portakv::check(written, dst_step_, dst_offset_, count, true, to, found);
  }

  const portakv_copy_view &src() const { return src_; }
  const portakv_copy_view &dst() const { return dst_; }

  // Tell both ends where their ids lie.
  void place() {
    portakv::place(read, lists_, from);
    portakv::place(written, lists_, to);
  }

 private:
  const Asker ask_;
  const portakv_copy_view &src_;
  const portakv_copy_view &dst_;
  const Object src_ids_;
  const Object dst_ids_;
  const int64_t src_step_;
  const int64_t dst_step_;
  const int64_t src_offset_;
  const int64_t dst_offset_;
  Lists lists_;

 public:
  int64_t count;
  bool from_host = false;
  bool to_host = false;
  Ids read = {};
  Ids written = {};
  End from = {};
  End to = {};
  Found found;
};

class ViewsCopy {
 public:
  ViewsCopy(const Python &python, Arguments arguments)
      : by_(*arguments.pointer<const portakv_executor>()),
        pair_(python, *by_.torch, arguments),
        means_(arguments, python, by_.current) {}

  int64_t prepare() {
    if (!means_.named) return PORTAKV_COPY_STREAM;
    pair_.check();
    require(pair_.from_host == pair_.to_host);
    pair_.place();
    launch_.plan(*by_.kernels, pair_.from, pair_.to, pair_.count, pair_.found, means_);
    return 0;
  }

  int64_t run() const { return launch_.run(means_); }

  int64_t finish(int64_t code) {
    const int64_t result = launched(code, pair_.count, pair_.found);
    if (result >= 0) raise_versions(*by_.torch, pair_.dst());
    return result;
  }

 private:
  const portakv_executor &by_;
  Pair pair_;
  const Means means_;
  KernelLaunch launch_;
};

// A question whether the work before the event of an end has ended.
class EndQuery {
 public:
  EndQuery(const Python &, Arguments arguments)
      : end_(*arguments.pointer<const portakv_copy_end>()) {}

  int64_t prepare() const { return 0; }
  int64_t run() const { return end_.query(end_.event); }
  int64_t finish(int64_t answer) const {
    const bool reports = answer == 0 && shared_word(end_.word) != 0;
    return reports ? int64_t{PORTAKV_COPY_REPORTS} : answer;
  }

 private:
  const portakv_copy_end &end_;
};

// The numbers of the units of one end, in the order of the positions; negative if the id is.
template <typename List>
struct Units {
  List ids;
  int64_t per_id;  // units of an id
  int64_t first;   // number of the first position's unit, counted from the first id

  int64_t operator[](int64_t at) const {
    if (per_id == 1) return ids[first + at];  // without divisions
    const int64_t id = ids[(first + at) / per_id];
    return id < 0 ? -1 : id * per_id + (first + at) % per_id;
  }
};

struct Consecutive {
  int64_t first;

  int64_t operator[](int64_t at) const { return first + at; }
};

// Return function(units) with the units of one end.
template <typename Function>
auto with_units(const Ids &ids, const End &end, int64_t unit, Function function) {
  const int64_t first = end.rows.offset / unit;
  if (ids.list.data == nullptr) return function(Consecutive{first});
  return with_ids(ids.list, [&](const auto &list) {
    return function(Units<std::decay_t<decltype(list)>>{list, ids.list.step / unit, first});
  });
}

// Memory for the numbers of the units of the source, then of the destination.
struct Numbers {
  int64_t *first;  // null: they are not written
  int64_t room;  // of each side

  explicit Numbers(Arguments &arguments)
      : first(arguments.pointer<int64_t>()), room(arguments.number()) {}
};

// Write the numbers of the units of a copy, and return how many are left without those that
// negative ids skip. The numbers of an end without ids are written only if units are skipped.
// Another thread may change ids after their check, so each number is compared again.
int64_t write_units(const Ids &read, const Ids &written, const End &src, const End &dst,
                    int64_t units, int64_t unit, bool skips, const Numbers &numbers) {
  const bool written_out = numbers.first != nullptr;
  require(!written_out || units <= numbers.room);
  int64_t *const from = numbers.first;
  int64_t *const to = written_out ? numbers.first + numbers.room : nullptr;
  if (!skips && !written_out) return units;
  if (!skips) {
    const auto write = [&](const Ids &ids, const End &end, int64_t *out) {
      if (ids.list.data == nullptr) return;
      with_units(ids, end, unit, [&](const auto &each) {
        Odd odd(end.rows.slots / unit - 1);
        for (int64_t at = 0; at < units; at++) {
          out[at] = each[at];
          odd.add(out[at]);
        }
        require(!odd.any());
      });
    };
    write(read, src, from);
    write(written, dst, to);
    return units;
  }
  return with_units(read, src, unit, [&](const auto &sources) {
    return with_units(written, dst, unit, [&](const auto &targets) {
      Odd odd_sources(src.rows.slots / unit - 1);
      Odd odd_targets(dst.rows.slots / unit - 1);
      int64_t left = 0;
      for (int64_t at = 0; at < units; at++) {
        const int64_t source = sources[at];
        const int64_t target = targets[at];
        if (source < 0 || target < 0) continue;
        odd_sources.add(source);
        odd_targets.add(target);
        if (written_out) {
          from[left] = source;
          to[left] = target;
        }
        left++;
      }
      require(!odd_sources.any() && !odd_targets.any());
      return left;
    });
  });
}

// Plan a checked copy, write its units, and return what core.h says.
Object units_of(const Python &python, const Ids &read, const Ids &written, const End &src,
                const End &dst, int64_t count, const Found &found, const Numbers &numbers,
                Object chunk) {
  const int64_t unit = plan_of(src, dst, count).unit;
  int64_t left = count / unit;
  if (found.guarded) {
    require(!found.skips);  // the other side's ids on a device are not read
  } else {
    left = write_units(read, written, src, dst, left, unit, found.skips, numbers);
  }
  require(left > 0);
  Owned described(python, chunk);
  const int64_t results[] = {count, unit, left};
  Owned result(python, Asker::raised(python.new_tuple(chunk ? 4 : 3)));
  for (ptrdiff_t i = 0; i < 3; i++) {
    python.set_tuple_item(result.get(), i, Asker::raised(python.new_integer(results[i])));
  }
  if (chunk) python.set_tuple_item(result.get(), 3, described.hand_over());
  return result.hand_over();
}

Object check_views(const Python &python, Arguments arguments) {
  const auto &torch = *arguments.pointer<const PortakvTorch>();
  Pair pair(python, torch, arguments);
  const Numbers numbers(arguments);
  pair.check();
  return units_of(python, pair.read, pair.written, pair.from, pair.to, pair.count, pair.found,
                  numbers, nullptr);
}

Object check_chunk(const Python &python, Arguments arguments) {
  ChunkPair pair(python, arguments);
  require(!any_error(*pair.copies.words));
  const Numbers numbers(arguments);
  pair.read_slots();
  pair.check();
  if (pair.store && pair.on_host) {
    for (const Span &span : pair.reader.view().spans) require(writable(span.first, span.past));
  }
  const Ids none{};
  const Ids &read = pair.store ? pair.slots : none;
  const Ids &written = pair.store ? none : pair.slots;
  return units_of(python, read, written, pair.from(), pair.to(), pair.count, pair.found, numbers,
                  pair.reader.answer());
}

// --- Across the link --------------------------------------------------------------------------

// Return the positions of a side whose ids lie in the host's memory.
Positions positions_of(const portakv_copy_view &view, const End &end, int64_t count) {
  Positions at{};
  at.entries = view.entries;
  at.addresses = view.entries == 1 ? view.addresses[0] : reinterpret_cast<intptr_t>(view.addresses);
  at.ids = end.rows.ids;
  if (at.ids != 0) {
    at.id_bytes = end.rows.wide % 2 != 0 ? 8 : 4;
    at.number = (end.rows.offset + count + end.step - 1) / end.step;
  }
  at.step = at.ids != 0 ? end.step : 1;
  at.offset = end.rows.offset;
  at.slots = end.rows.slots;
  return at;
}

// Return how many groups the units of a copy form; see `portakv_runs_groups`.
int64_t groups_of(const Positions &src, const Positions &dst, int64_t count, int64_t unit,
                  int64_t src_limit, int64_t dst_limit, int64_t most) {
  const bool plain = src.ids == 0 && dst.ids == 0 && src_limit == 0 && dst_limit == 0;
  if (plain || count <= unit) return 1;
  struct {
    Positions src;
    Positions dst;
    int64_t count;
  } const copy{src, dst, count};
  const int64_t groups = portakv_runs_groups(reinterpret_cast<const int64_t *>(&copy), unit,
                                             src_limit, dst_limit, most);
  require(groups > 0);
  return groups;
}

// A pick, as its caller passes it.
struct PickTerms {
  const double *costs;
  int64_t out;
  int64_t flags;

  explicit PickTerms(Arguments &arguments)
      : costs(arguments.pointer<const double>()),
        out(arguments.number()),
        flags(arguments.number()) {}

  bool new_ids() const { return (flags & 1) != 0; }
  bool reached() const { return (flags & 2) == 0; }
};

// A copy between a device and pinned memory.
class AcrossCopy {
 public:
  AcrossCopy(const Python &python, Arguments arguments)
      : crossings_(*arguments.pointer<const portakv_crossings>()),
        pair_(python, *crossings_.by.torch, arguments),
        terms_(arguments),
        uncrossed_(arguments.pointer<const Uncrossed>()),
        staging_(arguments.pointer<const int64_t>()),
        means_(arguments, python, crossings_.by.current) {}

  int64_t prepare() {
    if (!means_.named) return PORTAKV_COPY_STREAM;
    pair_.check();
    require(pair_.from_host != pair_.to_host && !pair_.found.guarded);
    pair_.place();
    answer_ = pick();
    const int64_t strategy = answer_ & 15;
    if (strategy == kZeroCopy && crossings_.by.kernels != nullptr && terms_.reached()) {
      // The planes follow the host's order: neighbours cross the link together.
      launch_.plan(*crossings_.by.kernels, pair_.from, pair_.to, pair_.count, pair_.found, means_,
                   pair_.from_host);
      return 0;
    }
    if (strategy == kStaged || strategy == kBatchedMemcpy) {
      require(!pair_.found.skips);
      const int64_t *const plan = crossings_.plans[strategy == kStaged ? 0 : 1];
      if (plan != nullptr && (strategy != kStaged || staging_ != nullptr)) {
        prepare_driver(plan);
        return 0;
      }
    }
    return PORTAKV_COPY_PREPARE - strategy;
  }

  int64_t run() {
    if (call_.plan == 0) return launch_.run(means_);
    return portakv_link_rows(crossings_.link, reinterpret_cast<const int64_t *>(&call_), &fault_);
  }

  int64_t finish(int64_t code) {
    if (call_.plan != 0) {
      if (means_.at != nullptr) means_.at->fault = fault_;
      if (code == PORTAKV_RUNS_EDGES || code == PORTAKV_LINK_ROOM) return code;
    }
    const int64_t result = launched(code, pair_.count, pair_.found);
    if (result < 0) return result;
    raise_versions(*crossings_.by.torch, pair_.dst());
    return result | answer_ << 2;
  }

 private:
  // Read the positions of both sides, and pick a strategy. Return the answer of the pick.
  int64_t pick() {
    copy_.src = positions_of(pair_.src(), pair_.from, pair_.count);
    copy_.dst = positions_of(pair_.dst(), pair_.to, pair_.count);
    copy_.count = pair_.count;
    if (crossings_.picked == nullptr) return crossings_.only;
    PickedCopies copies;
    std::memcpy(&copies, crossings_.picked, sizeof copies);
    const auto picked = [&](int64_t groups, int64_t host_groups) {
      const int64_t answer = portakv::pick(copies, terms_.costs, groups, host_groups, copy_.count,
                                           terms_.out, 0, terms_.new_ids());
      require(answer >= 0);
      return answer;
    };
    // More runs cost every other strategy more, and the kernel as much as before.
    const int64_t quick = picked(1, 1);
    if ((quick & 15) == kZeroCopy) return quick;
    constexpr int64_t kSorted = int64_t{1} << 16;  // more units are counted in the ids' order
    const Positions &host = pair_.from_host ? copy_.src : copy_.dst;
    const int64_t unit = crossings_.unit;
    const int64_t groups = groups_of(copy_.src, copy_.dst, copy_.count, unit, crossings_.src_limit,
                                     crossings_.dst_limit, kSorted);
    return picked(groups, groups_of(host, host, copy_.count, unit, crossings_.host_limit,
                                    crossings_.host_limit, 0));
  }

  // Fill in a copy by calls of the driver, as the words of a CrossingPlan say.
  void prepare_driver(const int64_t *plan) {
    require(pair_.count < kMostTokens);
    check_units(pair_.from, pair_.to, pair_.count, crossings_.unit);
    // The forms fit each other: there is a plan.
    check_ends(pair_.from, pair_.to, read_form(pair_.from.form).parts.size());
    const auto whole = [](const portakv_copy_view &view) {
      return view.entries > 1 ? view.entry_bytes : 0;
    };
    copy_.src_whole = whole(pair_.src());
    copy_.dst_whole = whole(pair_.dst());
    copy_.rows = (pair_.from_host ? pair_.to : pair_.from).rows;

    call_.plan = reinterpret_cast<intptr_t>(plan);
    call_.staging = reinterpret_cast<intptr_t>(staging_);
    call_.copy = reinterpret_cast<intptr_t>(&copy_);
    call_.stream = reinterpret_cast<intptr_t>(means_.stream);
    call_.before = call_.stream;
    call_.aside = crossings_.aside;
    call_.end = reinterpret_cast<intptr_t>(means_.at);
    if (uncrossed_ != nullptr) call_.uncrossed = *uncrossed_;
  }

  const portakv_crossings &crossings_;
  Pair pair_;
  const PickTerms terms_;
  const Uncrossed *const uncrossed_;
  const int64_t *const staging_;
  const Means means_;
  int64_t answer_ = 0;
  KernelLaunch launch_;
  // Of a copy by calls of the driver.
  CheckedCopy copy_{};
  CrossingCopy call_{};
  portakv_link_fault fault_{};
};

// --- Functions of Python ----------------------------------------------------------------------

Object answer(const Python &python, int64_t result) { return python.new_integer(result); }
Object answer(const Python &, Object result) { return result; }

// Run a body that holds the interpreter. What it throws ends it.
template <typename Body>
void attempt(const Python &python, Body &&body) {
  try {
    body();
  } catch (const Raised &) {
    python.clear_error();
  } catch (...) {
  }
}

// Answer a call of Python with so many arguments.
template <auto make, ptrdiff_t kCount>
Object called(Object, const Object *arguments, ptrdiff_t count) {
  const Python &functions = *python();
  Object result = nullptr;
  if (count == kCount) {
    attempt(functions, [&] {
      result = answer(functions, make(functions, Arguments(functions, arguments)));
    });
  }
  return result ? result : functions.new_integer(PORTAKV_COPY_OTHERWISE);
}

// Calls that leave the interpreter for the driver, which blocks while its queue is full. A call is
// an object that
//   reads its arguments when it is made, with the interpreter,
//   `prepare()`s with it, and returns 0, or else the result of the call,
//   `run()`s without it, and returns a code,
//   `finish(code)`es with it, and returns the result.
//
// Up to Python 3.13 an interpreter that ends unwinds each daemon thread that comes back to it. To
// end such an unwinding aborts the process, as a destructor without the interpreter may. So no frame
// that leaves or enters the interpreter has a `catch` or a destructor: each step is a frame of its
// own, and the object lies in plain memory.
template <typename Call>
[[gnu::noinline]] int64_t prepare(const Python &python, const Object *arguments, void *memory) {
  Call *call = nullptr;
  int64_t code = PORTAKV_COPY_OTHERWISE;
  attempt(python, [&] {
    call = new (memory) Call(python, Arguments(python, arguments));
    code = call->prepare();
  });
  if (call != nullptr && code != 0) call->~Call();
  return code;
}

template <typename Call>
[[gnu::noinline]] int64_t run(void *memory) {
  try {
    return static_cast<Call *>(memory)->run();
  } catch (...) {
    return PORTAKV_MALFORMED;
  }
}

template <typename Call>
[[gnu::noinline]] int64_t finish(const Python &python, int64_t code, void *memory) {
  Call *const call = static_cast<Call *>(memory);
  int64_t result = PORTAKV_COPY_OTHERWISE;
  attempt(python, [&] { result = call->finish(code); });
  call->~Call();
  return result;
}

template <typename Call, ptrdiff_t kCount>
Object waited(Object, const Object *arguments, ptrdiff_t count) {
  const Python &functions = *python();
  alignas(Call) unsigned char memory[sizeof(Call)];
  int64_t result = PORTAKV_COPY_OTHERWISE;
  if (count == kCount) result = prepare<Call>(functions, arguments, memory);
  if (result == 0) {
    void *const thread = functions.leave();
    const int64_t code = run<Call>(memory);
    functions.enter(thread);
    result = finish<Call>(functions, code, memory);
  }
  return functions.new_integer(result);
}

template <typename T>
T converted(Arguments &arguments) {
  if constexpr (std::is_pointer_v<T>) {
    return arguments.pointer<std::remove_pointer_t<T>>();
  } else {
    return static_cast<T>(arguments.number());
  }
}

template <typename... Types>
int64_t apply(int64_t (*function)(Types...), Arguments arguments) {
  const std::tuple<Types...> read{converted<Types>(arguments)...};  // in their order
  return std::apply(function, read);
}

template <typename... Types>
constexpr ptrdiff_t count_of(int64_t (*)(Types...)) {
  return sizeof...(Types);
}

template <auto function>
int64_t pass_on(const Python &, Arguments arguments) {
  return apply(function, arguments);
}

// Call an exported function that takes numbers and addresses.
template <auto function>
constexpr auto passed = called<pass_on<function>, count_of(function)>;

const PythonFunction kFunctions[] = {
    {"copy_chunk", waited<ChunkCopy, 8>, kFastCall, nullptr},
    {"copy_views", waited<ViewsCopy, 12>, kFastCall, nullptr},
    {"query_end", waited<EndQuery, 1>, kFastCall, nullptr},
    {"check_views", called<check_views, 12>, kFastCall, nullptr},
    {"check_chunk", called<check_chunk, 8>, kFastCall, nullptr},
    {"plan_make", passed<portakv_plan_make>, kFastCall, nullptr},
    {"copy_across", waited<AcrossCopy, 17>, kFastCall, nullptr},
    {"pick_copy", passed<portakv_pick_copy>, kFastCall, nullptr},
    {"view_read", passed<portakv_view_read>, kFastCall, nullptr},
    {"form_slice", passed<portakv_form_slice>, kFastCall, nullptr},
};

}  // namespace
}  // namespace portakv

using namespace portakv;

void *portakv_python_function(int64_t number) {
  const Python *functions = python();
  const int64_t count = sizeof(kFunctions) / sizeof(kFunctions[0]);
  if (!functions || number < 0 || number >= count) return nullptr;
  return functions->new_function(&kFunctions[number], nullptr, nullptr);
}
