// SPDX-License-Identifier: Apache-2.0
// One copy by kernels of a device, from what its caller passes to the launch: tensors and ids are
// read and checked, the copy is planned and launched. Nothing is kept from call to call.
//
// What a call does not fit ends it before anything is launched: Python then finds the reason and
// its sentence, or copies otherwise.
#include <algorithm>
#include <cstring>
#include <functional>

#include "core.h"
#include "few.h"
#include "form.h"
#include "ids.h"
#include "link.h"
#include "plan.h"
#include "rows.h"
#include "tensors.h"
#include "view.h"

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

// Ids of the host that kernels of a device read: memory that both reach.
class Room {
 public:
  Room(int64_t *first, int64_t count) : next_(first), left_(first ? count : 0) {}

  int64_t *take(int64_t count) {
    require(count <= left_);
    int64_t *result = next_;
    next_ += count;
    left_ -= count;
    return result;
  }

 private:
  int64_t *next_;
  int64_t left_;
};

Ids read_ids(const Asker &ask, Object ids, DlDevice device, Room &room) {
  Ids result{};
  const Object type = ask.python.type(ids);
  ask.python.release(type);  // the ids hold it
  if (type == ask.python.list_type) {
    const int64_t length = ask.python.list_size(ids);
    require(length > 0);  // without memory an empty list would look like no ids
    int64_t *out = room.take(length);
    const portakv_ids_list_call call{ids, out, length};
    require(portakv_ids_read_list(&call) == 0);
    result.list = {out, 8, 8, length, 0, 0, 0};
    result.on_host = true;
    return result;
  }
  const DlTensor facts = ask.describe(ids, false);
  require(facts.ndim == 1 && facts.dtype.code == kDlInt && facts.dtype.lanes == 1);
  require(facts.dtype.bits == 32 || facts.dtype.bits == 64);
  require(!ask.holds(ask.torch.is_neg, ids));
  const int64_t width = facts.dtype.bits / 8;
  const int64_t length = facts.shape[0];
  const int64_t stride = facts.strides ? width * facts.strides[0] : width;
  // A storage can have been resized.
  const int64_t reach = ask.storage_offset(ids) * width + (length - 1) * stride + width;
  require(length > 0 && stride >= 0 && reach <= ask.storage_bytes(ids));
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

// Check the ids that positions use, and give them to the kernels of a device.
void place(Ids &ids, int64_t step, int64_t offset, int64_t count, bool distinct, bool device_is_host,
           Room &room, End &end, Found &found) {
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
  require(offset >= 0 && offset / step <= list.length);
  require(count <= list.length * step - offset);
  end.rows.ids = reinterpret_cast<intptr_t>(list.data);
  end.rows.wide = list.width == 8;
  if (!ids.on_host) {
    found.guarded = true;
    return;
  }
  const int code = check_ids(list, end.rows.slots, distinct, nullptr);
  require(code >= 0);
  found.skips = found.skips || code == PORTAKV_IDS_NEGATIVE;
  const bool dense = list.stride == list.width || list.length == 1;
  if (device_is_host && dense) return;
  const Places used(list);
  int64_t *out = room.take(used.count());
  with_ids(list, [&](const auto &each) {
    for (int64_t at = used.first; at < used.past; at++) out[at - used.first] = each[at];
  });
  end.rows.ids = reinterpret_cast<intptr_t>(out);
  end.rows.wide = 1;
  end.rows.offset = offset % step;
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

void check_memory(const Asker &ask, const portakv_copy_view &view) {
  require(view.watch == nullptr || ask.unchanged(*view.watch));
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
  int64_t number() {
    const long long value = python_.integer(*next_++);
    if (value == -1 && python_.error()) throw Raised();
    return value;
  }
  template <typename T>
  T *pointer() {
    return reinterpret_cast<T *>(static_cast<intptr_t>(number()));
  }

 private:
  const Python &python_;
  const Object *next_;
};

// What `kernels` do with ids and status words: the last arguments of each call.
struct Means {
  Room lists;
  uint64_t status;
  void *stream;

  explicit Means(Arguments &arguments)
      : lists(nullptr, 0), status(0), stream(nullptr) {
    int64_t *first = arguments.pointer<int64_t>();
    lists = Room(first, arguments.number());
    status = static_cast<uint64_t>(arguments.number());
    stream = arguments.pointer<void>();
  }
};

// --- The copy ---------------------------------------------------------------------------------

// Plan a copy between two ends, and launch it. Return the result of core.h.
int64_t copy(const portakv_kernels &kernels, const Python &python, const End &src, const End &dst,
             int64_t count, const Found &found, const Means &means, bool by_source = false) {
  require(count > 0 && !overlap(src, dst));
  const Form from = read_form(src.form);
  const Form to = read_form(dst.form);
  require(from.parts.size() == to.parts.size());
  for (size_t k = 0; k < from.parts.size(); k++) {
    const int64_t read = src.dtypes[k];
    const int64_t written = dst.dtypes[k];
    require(read == written || read == 0 || written == 0);
  }
  Plan plan;
  Refusal refusal;
  require(make_plan(from, to, src.step, dst.step, 0, plan, refusal));
  // What begins or ends inside a unit is copied in parts.
  for (int64_t tokens :
       {count, src.rows.offset, dst.rows.offset, src.rows.slots, dst.rows.slots}) {
    require(tokens % plan.unit == 0);
  }
  const RowsOptions options{src.step, dst.step, src.table_on_device, dst.table_on_device, by_source};
  void *const thread = python.leave();  // a driver with a full queue blocks
  int64_t error = PORTAKV_MALFORMED;
  try {
    error = run_rows(kernels, plan, options, src.rows, dst.rows, count,
                     found.guarded ? means.status : 0, means.stream);
  } catch (...) {
  }
  python.enter(thread);
  if (error > 0) return PORTAKV_COPY_DRIVER - error;
  require(error == 0);
  return count << 2 | int64_t{found.guarded} << 1 | int64_t{found.skips};
}

int64_t copy_chunk(const Python &python, Arguments arguments) {
  const auto &kernels = *arguments.pointer<const portakv_kernels>();
  const auto &caches = *arguments.pointer<const portakv_copy_view>();
  const bool store = arguments.number() != 0;
  const Bound layout(arguments.pointer<const int64_t>());
  const Object chunk = arguments.object();
  const Object ids = arguments.object();
  const int64_t offset = arguments.number();
  const int64_t start = arguments.number();
  const int64_t end = arguments.number();
  Means means(arguments);

  require(layout.torch != nullptr && !layout.packed);
  const PortakvTorch &torch = *static_cast<const PortakvTorch *>(layout.torch);
  check_memory(Asker(python, torch), caches);
  TensorReader reader(python, torch, layout);
  reader.read(chunk);
  const DlDevice device = reader.device();
  require(device.type == caches.device_type && device.id == caches.device_id);
  if (store) {
    check_written(reader);
  } else {
    require(caches.writable != 0);
  }
  check_storages(reader);

  const View &view = reader.view();
  Few<int64_t, 40> addresses;
  for (size_t i = 0; i < view.entries.size(); i++) {
    addresses.push_back(reader.tensors().begins[static_cast<size_t>(view.entries[i])]);
  }
  const Form form = read_form(view.form.data());
  const size_t kv = form.parts.size();
  const int64_t *const last = view.form.data() + view.form.size();
  End dense{};
  dense.form = view.form.data();
  dense.dtypes = last - kv;
  dense.spans = view.spans.data();
  dense.span_count = view.spans.size();
  dense.rows.addresses = addresses.data();
  dense.rows.slots = view.slots;

  Ids slots = read_ids(reader.ask(), ids, device, means.lists);
  const int64_t length = slots.list.length - offset;
  const int64_t past = end == PORTAKV_COPY_TO_THE_END ? length : end;
  require(0 <= start && start < past && past <= length);
  const int64_t count = past - start;
  // Without an end, the slots fill the chunk, whose last block may be filled in part.
  const int64_t spare = view.slots - count;
  require(spare >= 0);
  require(end != PORTAKV_COPY_TO_THE_END || spare < std::max<int64_t>(1, form.block_size));

  End paged = end_of(caches);
  Found found;
  place(slots, 1, offset + start, count, !store, is_host(device.type), means.lists, paged, found);
  return copy(kernels, python, store ? paged : dense, store ? dense : paged, count, found, means);
}

int64_t copy_views(const Python &python, Arguments arguments) {
  const auto &kernels = *arguments.pointer<const portakv_kernels>();
  const Asker ask(python, *arguments.pointer<const PortakvTorch>());
  const auto &src = *arguments.pointer<const portakv_copy_view>();
  const auto &dst = *arguments.pointer<const portakv_copy_view>();
  const Object src_ids = arguments.object();
  const Object dst_ids = arguments.object();
  const int64_t src_step = arguments.number();
  const int64_t dst_step = arguments.number();
  const int64_t src_offset = arguments.number();
  const int64_t dst_offset = arguments.number();
  int64_t count = arguments.number();
  Means means(arguments);

  require(dst.writable != 0);
  // Across the link the device's kernels read or write memory of the host.
  const bool from_host = is_host(static_cast<int32_t>(src.device_type));
  const bool to_host = is_host(static_cast<int32_t>(dst.device_type));
  require(from_host != to_host || from_host || src.device_id == dst.device_id);
  require(from_host != to_host || from_host || src.device_type == dst.device_type);
  const portakv_copy_view &home = from_host ? dst : src;
  const DlDevice device{static_cast<int32_t>(home.device_type),
                        static_cast<int32_t>(home.device_id)};
  check_memory(ask, src);
  check_memory(ask, dst);
  Ids read{};
  Ids written{};
  if (src_ids != python.none) read = read_ids(ask, src_ids, device, means.lists);
  if (dst_ids != python.none) written = read_ids(ask, dst_ids, device, means.lists);
  if (count == PORTAKV_COPY_TO_THE_END) {
    const int64_t src_tokens = product(read.list.length, src_step) - src_offset;
    const int64_t dst_tokens = product(written.list.length, dst_step) - dst_offset;
    require(read.list.data || written.list.data);
    count = read.list.data ? src_tokens : dst_tokens;
    require(!read.list.data || !written.list.data || src_tokens == dst_tokens);
  }
  require(count > 0);
  End from = end_of(src);
  End to = end_of(dst);
  Found found;
  const bool on_host = is_host(device.type);
  place(read, src_step, src_offset, count, false, on_host, means.lists, from, found);
  place(written, dst_step, dst_offset, count, true, on_host, means.lists, to, found);
  // The planes follow the host's order: neighbours cross the link together.
  const bool by_source = from_host && !to_host;
  return copy(kernels, python, from, to, count, found, means, by_source);
}

// --- Copies that other means make ---------------------------------------------------------------

// Return the positions of a side whose ids lie in the host's memory.
Positions positions_of(const portakv_copy_view &view, const End &end, int64_t step, int64_t count) {
  Positions at{};
  at.entries = view.entries;
  at.addresses = view.entries == 1 ? view.addresses[0] : reinterpret_cast<intptr_t>(view.addresses);
  at.ids = end.rows.ids;
  if (at.ids != 0) {
    at.id_bytes = end.rows.wide != 0 ? 8 : 4;
    at.number = (end.rows.offset + count + step - 1) / step;
  }
  at.step = at.ids != 0 ? step : 1;
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

int64_t read_copy(const Python &python, Arguments arguments) {
  const Asker ask(python, *arguments.pointer<const PortakvTorch>());
  const auto &src = *arguments.pointer<const portakv_copy_view>();
  const auto &dst = *arguments.pointer<const portakv_copy_view>();
  const Object src_ids = arguments.object();
  const Object dst_ids = arguments.object();
  const int64_t src_step = arguments.number();
  const int64_t dst_step = arguments.number();
  const int64_t src_offset = arguments.number();
  const int64_t dst_offset = arguments.number();
  int64_t count = arguments.number();
  const int64_t unit = arguments.number();
  const int64_t src_limit = arguments.number();
  const int64_t dst_limit = arguments.number();
  const int64_t host_limit = arguments.number();
  int64_t *const first = arguments.pointer<int64_t>();
  const int64_t size = arguments.number();
  Room room(first, size);
  auto &out = *arguments.pointer<CheckedCopy>();

  require(dst.writable != 0);
  const bool from_host = is_host(static_cast<int32_t>(src.device_type));
  require(from_host != is_host(static_cast<int32_t>(dst.device_type)));
  check_memory(ask, src);
  check_memory(ask, dst);
  const DlDevice nowhere{-1, -1};  // ids of a device are not read here
  Ids read{};
  Ids written{};
  if (src_ids != python.none) read = read_ids(ask, src_ids, nowhere, room);
  if (dst_ids != python.none) written = read_ids(ask, dst_ids, nowhere, room);
  if (count == PORTAKV_COPY_TO_THE_END) {
    const int64_t src_tokens = product(read.list.length, src_step) - src_offset;
    const int64_t dst_tokens = product(written.list.length, dst_step) - dst_offset;
    require(read.list.data || written.list.data);
    count = read.list.data ? src_tokens : dst_tokens;
    require(!read.list.data || !written.list.data || src_tokens == dst_tokens);
  }
  require(count > 0);
  End from = end_of(src);
  End to = end_of(dst);
  // A list was read to where kernels reach it. The host's own side is read during the call.
  const auto listed = [&](const Ids &ids) {
    const int64_t *const data = static_cast<const int64_t *>(ids.list.data);
    return std::less_equal<>()(first, data) && std::less<>()(data, first + size);
  };
  const bool src_stays = from_host || listed(read);
  const bool dst_stays = !from_host || listed(written);
  Found found;
  place(read, src_step, src_offset, count, false, src_stays, room, from, found);
  place(written, dst_step, dst_offset, count, true, dst_stays, room, to, found);
  require(!found.skips && !overlap(from, to));
  for (const int64_t tokens :
       {count, from.rows.offset, to.rows.offset, from.rows.slots, to.rows.slots}) {
    require(tokens % unit == 0);
  }
  // The forms fit each other: there is a plan.
  const size_t kv = read_form(src.form).parts.size();
  for (size_t k = 0; k < kv; k++) {
    require(src.dtypes[k] == dst.dtypes[k] || src.dtypes[k] == 0 || dst.dtypes[k] == 0);
  }

  out.src = positions_of(src, from, src_step, count);
  out.dst = positions_of(dst, to, dst_step, count);
  out.count = count;
  const Positions &host = from_host ? out.src : out.dst;
  constexpr int64_t kSorted = int64_t{1} << 16;  // more units are counted in the order of their ids
  out.groups = groups_of(out.src, out.dst, count, unit, src_limit, dst_limit, kSorted);
  out.host_groups = groups_of(host, host, count, unit, host_limit, host_limit, 0);
  return count << 2;
}

// Make one copy for Python, with so many arguments.
template <int64_t (*make)(const Python &, Arguments), ptrdiff_t kCount>
Object called(Object, const Object *arguments, ptrdiff_t count) {
  const Python &functions = *python();
  int64_t result = PORTAKV_COPY_OTHERWISE;
  if (count == kCount) {
    try {
      result = make(functions, Arguments(functions, arguments));
    } catch (const Raised &) {
      functions.clear_error();
    } catch (...) {
    }
  }
  return functions.new_integer(result);
}

const PythonFunction kFunctions[] = {
    {"copy_chunk", called<copy_chunk, 13>, kFastCall, nullptr},
    {"copy_views", called<copy_views, 15>, kFastCall, nullptr},
    {"read_copy", called<read_copy, 17>, kFastCall, nullptr},
};

}  // namespace
}  // namespace portakv

using namespace portakv;

void *portakv_copy_function(int64_t number) {
  const Python *functions = python();
  const int64_t count = sizeof(kFunctions) / sizeof(kFunctions[0]);
  if (!functions || number < 0 || number >= count) return nullptr;
  return functions->new_function(&kFunctions[number], nullptr, nullptr);
}
