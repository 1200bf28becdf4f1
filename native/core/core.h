// SPDX-License-Identifier: Apache-2.0
// The contract of PortaKV's compiled core: every function that Python calls, with its rules.
//
// ABI        Plain C. Python loads the library by ctypes: by `PyDLL` where a function reads Python
//            objects, because the caller then holds the interpreter; by `CDLL` where it does not,
//            because ctypes then releases the interpreter. No header of Python, torch, CUDA or HIP
//            is needed to build it. Drivers come by `dlopen`.
// Units      Sizes, strides, offsets and addresses are bytes unless a comment says otherwise.
// Ownership  The caller owns every buffer that it passes. The core reads and writes it during the
//            call alone, with three exceptions, which their functions repeat: an engine of files
//            uses the memory of its requests until they have ended, and its registered memory and
//            system until it closes; a status word is written until the copy's event has been
//            reached; and objects keep the functions of drivers that they are opened with. A struct
//            that names other memory (a view, a watch, an end) has an owner, which keeps that memory
//            as long as it passes the struct. What a function allocates, another function named here
//            releases. Returned strings are constants of the library.
// Errors     A function that can fail returns a code, 0 for success, and writes the values that the
//            error's sentence needs into a struct of the caller. No exception leaves the library.
//            An interpreter that ends may unwind a daemon thread through a function that waits.
// Threads    Any number of threads may call any function. State lives in objects that Python owns
//            and closes; only the functions of drivers are global. Words that two threads or a
//            device share are read with acquire and written with release. Ids of the host may change
//            during a call: which rows then move is open, but all of them lie in the views.
// Words      Forms, plans and the like are arrays of int64 that Python and the core read alike. The
//            comment of each struct that has words says so and lists them:
//              form.h    Form, Part, Step: a view without its addresses
//              view.h    Bound, View::form: a layout with its extents, and what reading answers
//              plan.h    Plan, Nest, Loop, Side, and PackPlan, PackNest: copies between two forms
//              rows.h    RowsShape, RowsSide, RowsOptions: kernels of a plan
//              pack.h    PackShape: kernels of a plan that packs
//              runs.h    Positions: a side of a copy, which `Runs and pieces` below also lists
//              pieces.h  PiecesRequest, Limits, Edges
//              pick.h    PickRules, PickedCopies, Shape: picks of a strategy
//              link.h    CrossingPlan, CrossingCopy, StagingBuffers, CutRules, SliceOrder and others
//            Read them in this order; the functions below name what they take.
#ifndef PORTAKV_CORE_H
#define PORTAKV_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Marks the functions that the library exports. Their names begin with `portakv_`: the linker hides
// every other symbol.
#if defined(_WIN32)
#define PORTAKV_API __declspec(dllexport)
#else
#define PORTAKV_API __attribute__((visibility("default")))
#endif

// The version of this header, which `portakv.core.library` compares with its own.
#define PORTAKV_CORE_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

// --- The library ------------------------------------------------------------------------------

// Return the hash of the sources that the library was built from, in hexadecimal digits.
PORTAKV_API const char *portakv_core_sources(void);

// Return PORTAKV_CORE_ABI of the header that the library was built with.
PORTAKV_API int portakv_core_abi(void);

// Check the machine and the build. Return 0, or the number of the first check that fails, from 1 on
// in the order of self_test.cpp.
PORTAKV_API int portakv_core_self_test(void);

// --- Plans ------------------------------------------------------------------------------------

// Codes of the functions below. The values of a refusal's sentence are in `out`.
enum {
  PORTAKV_MALFORMED = -1,           // the words are not those of forms, or products pass 64 bits
  PORTAKV_NO_MEMORY = -2,           // an allocation failed
  PORTAKV_PLAN_UNLIKE = -10,        // the forms differ in kv, layers, heads, widths or pages
  PORTAKV_PLAN_UNIT = -11,          // the unit does not divide the largest unit, which is the value
  PORTAKV_PLAN_PAGES = -12,         // no unit holds whole opaque pages
  PORTAKV_PLAN_NO_FACTOR = -13,     // tokens moved together, tokens of a block
  PORTAKV_PLAN_NO_REFINEMENT = -14  // axis, counts of steps of both sides, then their extents
};

// The words that `out` has room for at least, so that the values of every refusal fit.
#define PORTAKV_PLAN_LEAST 128

// Plan a copy between two forms, and write the words of the plan to `out`.
//
// src, dst            words of the forms (form.h)
// src_step, dst_step  tokens for each id of that side; 0 for a side without ids
// unit                tokens moved together; 0 for the most that both sides allow
// Return the words of the plan, more than `capacity` if `out` is too small; or a code.
PORTAKV_API int64_t portakv_plan_make(const int64_t *src, const int64_t *dst, int64_t src_step,
                                      int64_t dst_step, int64_t unit, int64_t *out,
                                      int64_t capacity);

// Plan a copy that packs the blocks of one form into those of another, or unpacks them.
//
// raw, packed   words of the forms
// packs         1 from raw to packed, 0 from packed to raw
// equal_planes  1 if the packed planes of all kv have one geometry
// Write the words of the plan (PackPlan in plan.h) to `out`; return as above.
PORTAKV_API int64_t portakv_plan_pack(const int64_t *raw, const int64_t *packed, int packs,
                                      int equal_planes, int64_t *out, int64_t capacity);

// --- Kernels that copy rows -------------------------------------------------------------------

enum {
  PORTAKV_ROWS_LOOPS = -40,       // the kernels' argument does not hold a nest; its loops, its planes
  PORTAKV_ROWS_UNITS = -41,       // the kernels count units, of a view and of a copy, in 32 bits
  PORTAKV_ROWS_NOT_LOADED = -42,  // the kernel of a nest was not added
  PORTAKV_ROWS_NO_TABLE = -43     // a kernel reads a side's table on the device, and there is none
};

// The loaded kernels of a device by their shapes. Any number of threads may use and add to one.
typedef struct portakv_kernels portakv_kernels;

// Ids of a side: int32 and int64 where the kernels read them, and such ids where only the host reads
// them during the call, each below 2^31: they travel in the arguments of as many launches as it takes.
enum {
  PORTAKV_WIDE_32 = 0,
  PORTAKV_WIDE_64 = 1,
  PORTAKV_WIDE_32_HOST = 2,
  PORTAKV_WIDE_64_HOST = 3,
};

// What a call says of one side.
typedef struct portakv_rows_side {
  const int64_t *addresses;  // of the view, in memory of the host; none is read of a `table` alone
  int64_t table;             // where a device reads those addresses; 0: it need not
  int64_t ids;               // where the ids lie next to each other; 0: consecutive tokens
  int64_t wide;              // which ids: of PORTAKV_WIDE_..
  int64_t offset;            // tokens that are passed over
  int64_t slots;             // tokens of the view
} portakv_rows_side;

// Write the words of one nest of a plan as a kernel: `RowsShape` of rows.h has their order, and
// `RowsOptions` that of `options`. Return their number, which may exceed the capacity; or a code,
// with the values of its sentence in `out`.
PORTAKV_API int64_t portakv_rows_describe(const int64_t *plan, int64_t nest,
                                          const int64_t *options, int64_t *out, int64_t capacity);

// Return a table without kernels; null if memory is short. The caller closes it, when no thread uses
// it. `launch` is cuLaunchKernel, or a function of another driver with its arguments.
PORTAKV_API portakv_kernels *portakv_kernels_open(void *launch);

PORTAKV_API void portakv_kernels_close(portakv_kernels *kernels);

// Add the kernel of a shape, unless there is one. Return 0 or a code.
//
// shape, count  words of `portakv_rows_describe`
// cut           Threads of a block, the most units of a launch, 0; or 1 and, of a copy by a few
//               blocks that stay, the bytes up to which it is small, the most blocks of a small and
//               of a large one, the vectors of a block's turn, the vectors of a unit in a group of
//               planes, the groups; then a count of tunings and for each the least bytes of a copy,
//               the vectors of a thread (one or two), the bytes to prefetch ahead.
// functions     Two of the driver's handles, by the vectors that a thread moves.
PORTAKV_API int64_t portakv_kernels_add(portakv_kernels *kernels, const int64_t *shape,
                                        int64_t count, const int64_t *cut,
                                        const int64_t *functions);

// Order a copy of `count` tokens, whole units, on a stream of the current device by the kernels of
// its nests. `status` is the device's address of the word for the first bad id; 0: none. Return 0,
// the driver's error, or a code. After a code nothing was launched; after the driver's error the
// launches before it stay ordered.
PORTAKV_API int64_t portakv_rows_run(const portakv_kernels *kernels, const int64_t *plan,
                                     const int64_t *options, const portakv_rows_side *src,
                                     const portakv_rows_side *dst, int64_t count, uint64_t status,
                                     void *stream);

// --- Kernels that pack and unpack -------------------------------------------------------------

// The launches of a plan that packs or unpacks. Any number of threads may use one.
typedef struct portakv_pack portakv_pack;

// Write the words of one nest of a plan as a kernel: `PackShape` of pack.h has their order. Return
// as `portakv_rows_describe`; the values of PORTAKV_ROWS_LOOPS are the loops over planes and those
// inside a plane.
PORTAKV_API int64_t portakv_pack_describe(const int64_t *plan, int64_t nest,
                                          const int64_t *options, int64_t *out, int64_t capacity);

// Return the launches of a plan; null if words are malformed or memory is short. The caller
// closes it.
//
// cuts       For each nest: threads of a thread block, planes of a thread block.
// functions  For each nest the driver's handle.
// launch     As for `portakv_kernels_open`.
PORTAKV_API portakv_pack *portakv_pack_open(const int64_t *plan, const int64_t *options,
                                            const int64_t *cuts, const int64_t *functions,
                                            void *launch);

PORTAKV_API void portakv_pack_close(portakv_pack *pack);

// Order a copy as `portakv_rows_run`. `overflow` is the device's address of a word for each unit,
// which gets 1 if the unit does not fit.
PORTAKV_API int portakv_pack_run(const portakv_pack *pack, const portakv_rows_side *src,
                                 const portakv_rows_side *dst, int64_t count, uint64_t status,
                                 uint64_t overflow, void *stream);

// --- Ids --------------------------------------------------------------------------------------
//
// Position p of one side of a copy, with q = p + offset, is slot ids[q / step] * step + q % step.
// A negative id skips its positions. Each call is one struct, since ctypes passes one pointer in a
// tenth of the time of ten numbers. The calls are short: they hold the interpreter.

// A list of ids in host memory, and the positions of it that one side of a copy uses.
typedef struct portakv_ids {
  const void *data;  // the first id; any alignment
  int64_t width;     // bytes of an id: 4 or 8, signed
  int64_t stride;    // from one id to the next one; may be negative
  int64_t length;    // ids
  int64_t step;      // tokens of an id
  int64_t offset;    // tokens of the first ids that are passed over
  int64_t count;     // positions
} portakv_ids;

// Codes of `portakv_ids_*`, next to PORTAKV_MALFORMED (a list that is not one of Python's integers of
// at most 64 bits) and PORTAKV_NO_MEMORY.
enum {
  PORTAKV_IDS_CLEAN = 0,     // every id names slots of the view
  PORTAKV_IDS_NEGATIVE = 1,  // the same, but for negative ids
  PORTAKV_IDS_PAST = -30,    // a slot lies past the end of the view
  PORTAKV_IDS_TWICE = -31    // a slot occurs twice
};

// What is wrong with ids. A place is an id's in the list, -1 for none.
typedef struct portakv_ids_fault {
  int64_t position;     // PAST: the first position whose slot is past the end
  int64_t slot;         // that slot; TWICE: the smallest slot that occurs twice
  int64_t id;           // PAST: the id of that slot
  int64_t times;        // TWICE: how often the slot occurs
  int64_t past_place;   // the first id of which any slot is past the end, used or not
  int64_t past_id;
  int64_t first_place;  // TWICE: the first id that occurs again, its first place
  int64_t again_place;  // and its second place
  int64_t again_id;
} portakv_ids_fault;

typedef struct portakv_ids_check_call {
  portakv_ids ids;
  int64_t slots;             // of the view
  int64_t distinct;          // other than 0: no slot may occur twice
  portakv_ids_fault *fault;  // written with PAST and TWICE; may be NULL
} portakv_ids_check_call;

// Check the ids that the positions use. A slot past the end is found before one that occurs twice.
PORTAKV_API int portakv_ids_check(const portakv_ids_check_call *call);

typedef struct portakv_ids_list_call {
  void *list;    // an object of Python: a list
  int64_t *out;  // [length]
  int64_t length;
} portakv_ids_list_call;

// Read a Python list of integers. The caller holds the interpreter. Return 0, or MALFORMED for a
// list of another length, or with an item of another type than int or of more than 64 bits.
PORTAKV_API int portakv_ids_read_list(const portakv_ids_list_call *call);

typedef struct portakv_ids_slots_call {
  portakv_ids ids;
  int64_t every;
  int64_t *out;  // [(count + every - 1) / every]
} portakv_ids_slots_call;

// Write the slot of each `every`-th position: -1 where the id is negative, 2^62 or the last before
// it for an id past that. Return how many slots the ids cover.
PORTAKV_API int64_t portakv_ids_slots(const portakv_ids_slots_call *call);

typedef struct portakv_ids_last_call {
  portakv_ids ids;  // its positions do not matter
  int64_t *out;     // [length]; NULL: write nothing
} portakv_ids_last_call;

// Write all ids, with -1 in place of each id of 0 or more that a later one equals. Return how many
// those are, or NO_MEMORY.
PORTAKV_API int64_t portakv_ids_last(const portakv_ids_last_call *call);

// --- Runs and pieces --------------------------------------------------------------------------
//
// A copy is words: the memory and the positions of the source and of the destination, then the
// number of positions. A side's words are
//   addresses   a pointer to the table of addresses; the address itself if the table has one entry
//   entries     of the table
//   ids         a pointer to ids; negative ids skip their positions
//   id_bytes    8 or 4; 0: no ids, position p is slot p + offset
//   number      of ids
//   step        tokens of an id
//   offset      tokens that are passed over before the first position
//   slots       tokens of the view
// `plan` is the words of a plan (plan.h). Functions that list write columns of `room` words each,
// and return the number of rows that there are: if that is more than `room`, call again with more.

enum {
  PORTAKV_RUNS_OUTSIDE = -20,  // a position past its list of ids, or past its view
  PORTAKV_RUNS_EDGES = -21     // call again with the edges of allocations
};

// List the runs of a copy: source, destination, bytes. They are in the order of the source, equal
// sources in the order of the destination, and neighbours on both sides are merged.
PORTAKV_API int64_t portakv_runs_list(const int64_t *plan, const int64_t *copy, int64_t *out,
                                      int64_t room);

// Return the number of groups of units. In a group the numbers of units rise by one on both sides,
// and no unit but the first is a multiple of a side's limit (0: no limit). Ids are not checked.
// `most`: sort up to so many units by the source before; among more units, those that fall by one
// on both sides also form groups. 0: neither.
PORTAKV_API int64_t portakv_runs_groups(const int64_t *copy, int64_t unit, int64_t src_limit,
                                        int64_t dst_limit, int64_t most);

// List the pieces of a copy: `out` is a word, 1 if a piece has several rows, and six columns
// (destination, source, width, height, pitch of the destination, pitch of the source), of which
// only three are written if all pieces have one row. `request` is the words of a copy, of Limits
// (pieces.h), then
//   src_whole, dst_whole  all bytes at each address of a side; 0: unknown, or it has one address
//   merged                1: runs that meet where planes end are merged, too
//   edged                 1: the edges of allocations are listed; 0: they are asked for if needed
// and three lists of addresses that no piece crosses, each a pointer and a number: where
// registrations meet, and the edges of the allocations of each side.
PORTAKV_API int64_t portakv_pieces_list(const int64_t *plan, const int64_t *request, int64_t *out,
                                        int64_t room);

// Count the runs of so many units of a copy in groups, see `portakv_runs_groups`, and about so many
// pieces. `limits` are those of a request; a width of 0 below which rows fold: nothing folds. Write
// both numbers, and return 0.
PORTAKV_API int64_t portakv_pieces_count(const int64_t *plan, int64_t units, int64_t groups,
                                         const int64_t *limits, int64_t *out);

// --- Picks of transfer strategies -------------------------------------------------------------
//
// pick.h has the words, and the order of the strategies, by which sets of strategies are bits.

// An answer: the strategy, its reason (PickReason of pick.h) times 16, and these flags.
enum {
  PORTAKV_PICK_SEVERAL = 1 << 8,    // several take about the least time
  PORTAKV_PICK_EXPOSED = 1 << 9,    // a part of the host's time counts in any case
  PORTAKV_PICK_SLOWED = 1 << 10,    // a model would slow the kernel down
  PORTAKV_PICK_QUICKER = 1 << 11,   // the kernel would take less, but the terms exclude it
  PORTAKV_PICK_EXCLUDED = 1 << 12,  // the terms exclude the kernel
  PORTAKV_PICK_NONE = -70           // no strategy takes the copy
};

// Pick the strategy of a copy. Return an answer.
//
// rules   PickRules
// costs   measurements of the direction
// shapes  for each strategy a Shape
// out, waits, new_ids  as pick.h says
PORTAKV_API int64_t portakv_pick(const int64_t *rules, const double *costs, const int64_t *shapes,
                                 int64_t out, int64_t waits, int new_ids);

// Pick the strategy of so many tokens of one plan, in groups. Return an answer, or a code.
//
// copies  PickedCopies
// groups, host_groups, count, and the others  as pick.h says
PORTAKV_API int64_t portakv_pick_copy(const int64_t *copies, const double *costs, int64_t groups,
                                      int64_t host_groups, int64_t count, int64_t out,
                                      int64_t waits, int new_ids);

// Write the seconds of the device and of the host for so many runs of one size. `columns` are
// measurements of one strategy, of one column at least.
PORTAKV_API void portakv_cost(const double *columns, double run_bytes, double runs, double *out);

// --- The link between a device and the host ---------------------------------------------------
//
// Words and their order are those of link.h and link.cpp. Calls release the interpreter: a driver
// with a full queue blocks. The current context is that of the link's device.

// CUDA's driver as a link uses it, and what its streams moved. Any number of threads may use one.
typedef struct portakv_link portakv_link;

// What failed; `portakv_link_fault.what`. A code below 0 is of the pieces of a copy, or of memory.
enum {
  PORTAKV_LINK_COPY = 1,   // a copy of rows; their number, their width
  PORTAKV_LINK_BATCH = 2,  // a batch of copies; their number
  PORTAKV_LINK_REST = 3,   // a wait for a word
  PORTAKV_LINK_WORD = 4,   // the allocation of a word
  PORTAKV_LINK_EVENT = 5,  // an event that orders two streams
  PORTAKV_LINK_STAGE = 6   // the device's stage of a slice; its code may be PORTAKV_ROWS_UNITS
};

// A code of `portakv_link_rows`: nothing was submitted, since the buffers are too small. The values
// are the bytes of a buffer and its tokens.
enum { PORTAKV_LINK_ROOM = -60 };

typedef struct portakv_link_fault {
  int64_t code;  // the driver's error, or a code of this header
  int64_t what;
  int64_t slice;
  int64_t values[2];
} portakv_link_fault;

// Return a link; null if memory is short. `functions` are the addresses of cuMemcpyAsync,
// cuMemcpy2DAsync_v2, cuMemcpyBatchAsync_v2, cuMemcpyBatchAsync, cuStreamWaitValue32_v2,
// cuMemHostAlloc, cuThreadExchangeStreamCaptureMode, cuEventCreate, cuEventDestroy_v2,
// cuEventRecord, cuStreamWaitEvent and cuStreamQuery; 0 for one of the batches, or the exchange, if
// the driver lacks it.
PORTAKV_API portakv_link *portakv_link_open(const int64_t *functions);

PORTAKV_API void portakv_link_close(portakv_link *link);

// Write the schedule of a copy in slices (`SliceOrder`): groups of steps, each a count and so many
// `ScheduleStep`, before the first slice, of each slice, after the last one, and after a step that
// failed. Return the number of words, more than `room` if `out` is too small; or a code.
PORTAKV_API int64_t portakv_link_schedule(const int64_t *order, int64_t *out, int64_t room);

// Cut a copy of so many tokens into slices by `CutRules`. `offset` are tokens of the host's rows that
// are passed over, and `idle` is 1 if nothing crosses. Write the tokens of a buffer, then for each
// slice the first token and the number of its tokens. Return the number of words, as above.
PORTAKV_API int64_t portakv_link_cut(const int64_t *rules, int64_t count, int64_t offset,
                                     int64_t idle, int64_t *out, int64_t room);

// Order pieces on a stream (`Crossing`). `columns` are the six of `portakv_pieces_list`, the last
// three null if all pieces have one row. Return 0 or `fault->code`: pieces may be on their way.
PORTAKV_API int64_t portakv_link_submit(portakv_link *link, const int64_t *const *columns,
                                        int64_t number, const int64_t *crossing,
                                        portakv_link_fault *fault);

// Submit a copy of rows (`CrossingCopy`) between a device and the host, its slices as the schedule
// says. If a step fails, what was submitted stays ordered. Return 0 or `fault->code`, also
// PORTAKV_RUNS_EDGES; the slice of a fault is the tokens of the slice that failed.
PORTAKV_API int64_t portakv_link_rows(portakv_link *link, const int64_t *copy,
                                      portakv_link_fault *fault);

// --- Slices of forms --------------------------------------------------------------------------

enum {
  PORTAKV_SLICE_HEADS = -80,  // the heads begin or end inside a factor of their axis
  PORTAKV_SLICE_LAYERS = -81  // the layers do
};

// Slice a form. Return the number of words of the answer, more than `capacity` if `out` is too
// small; or a code.
//
// form    words of the form (form.h) of a view of `count` blocks, or of a chunk's tokens
// ranges  the first and the number of the kv, the layers and the heads of the slice
// out     how many entries of the slice an entry of the view becomes, and the number of entries of
//         the slice; then for each the number of the view's entry times these copies, plus which of
//         the copies it is, and the bytes that its address gains; then the words of the form
PORTAKV_API int64_t portakv_form_slice(const int64_t *form, int64_t count, const int64_t *ranges,
                                       int64_t *out, int64_t capacity);

// --- Views ------------------------------------------------------------------------------------

// Codes of the functions below.
enum {
  // The tensors contradict the layout or the declared extents.
  PORTAKV_VIEW_CONTRADICTION = -1,
  // The bytes of a slot of a packed view are not contiguous.
  PORTAKV_VIEW_SLOTS_APART = -2,
  // A number passes 64 bits, or memory for the answer is missing.
  PORTAKV_VIEW_PAST_64_BITS = -3,
  // `portakv_view_read_tensors` does not read such tensors or containers; `portakv_view_read` may.
  PORTAKV_VIEW_NOT_PLAIN = -4
};

// Read tensors that words describe. Return the number of words of the answer, or a code. The answer
// is whole if it is not longer than `capacity`.
//
// bound       a layout with its declared extents: the words of `Bound` in view.h
// sizes       the extent of each container level
// tensors     number of tensors, number of kinds, 1 if addresses follow; then for each tensor the
//             addresses of its first byte and of its storage, if they follow, and its kind; then for
//             each kind: bytes of an element, word of the dtype, dimensions, shape, strides in
//             elements
// place       the position in `PLACES` of portakv/view/form.py
// table_on_device  1 if a device alone knows the addresses
// alignment   the bytes that divide all addresses; 0: of the addresses that follow
// out         slots, the numbers of entries, of spans and of the form's words; then the tensors
//             that are entries, the first byte and the byte past the last of each span, and the
//             words of `View::form` in view.h
PORTAKV_API int64_t portakv_view_read(const int64_t *bound, const int64_t *sizes,
                                      const int64_t *tensors, int64_t place,
                                      int64_t table_on_device, int64_t alignment, int64_t *out,
                                      int64_t capacity);

// Return 1 if the functions of an interpreter were found, which the functions below need; else 0.
PORTAKV_API int portakv_python_found(void);

// What the core uses of torch. Python owns the objects.
//
// A handle is torch's AtenTensorHandle: the `at::Tensor` of C++ that each tensor's object contains, a
// pointer to the tensor's implementation. Functions with an `out` belong to torch's stable interface,
// and return 0 or a code.
typedef struct {
  const void *exchange;  // torch.Tensor's DLPackExchangeAPI
  void *tensor;          // the types whose tensors are plain: torch.Tensor
  void *parameter;       // and torch.nn.Parameter
  void *is_pinned;       // an unbound method of torch.Tensor
  void *forms;           // a dictionary of forms by their words, as bytes
  int64_t handle_at;     // bytes from a tensor's object to its handle
  int (*storage_offset)(void *handle, int64_t *out);
  int (*storage_bytes)(void *handle, int64_t *out);
  int (*dtype)(void *handle, int32_t *out);
  int64_t uint8;  // the numbers of the dtypes of plain bytes
  int64_t int8;
  bool (*is_neg)(const void *handle);
  bool (*is_conj)(const void *handle);
  bool (*is_inference)(const void *handle);
  bool (*requires_grad)(const void *implementation);
  void (*raise_version)(void *handle);  // of a tensor that is none of inference
} PortakvTorch;

// Read a tensor, or plain tensors in lists, tuples and dicts as the layout names them. The caller
// holds the interpreter.
//
// Return a tuple: the form of these words, or the words of `View::form` as bytes if `forms` has no
// form or the view is packed; the addresses of the entries; the tensors at the entries; the spans,
// as a list of pairs; slots; True if a tensor requires grad. Return a code as an integer if the
// tensors cannot be read. Return NULL if Python raised an error.
PORTAKV_API void *portakv_view_read_tensors(const int64_t *bound, void *tensors);

// --- Whole copies -------------------------------------------------------------------------------
//
// One call reads the tensors and the ids, checks them, plans the copy and launches its row kernels.
// It keeps nothing. The caller holds the interpreter, which the launch releases.

enum {
  PORTAKV_COPY_OTHERWISE = -50,  // nothing was launched: the call is none of these, or is wrong
  PORTAKV_COPY_STREAM = -51,     // nothing was launched: name the stream
  // Nothing was launched, for lack of the strategy that was picked. Its number is subtracted.
  PORTAKV_COPY_PREPARE = -110,
  PORTAKV_COPY_DRIVER = -1000,   // less the driver's error; launches before it stay ordered
  PORTAKV_COPY_TO_THE_END = -1,  // of an end, or of a count: as many as there are
  PORTAKV_COPY_REPORTS = -1      // the work has ended, and its status word reports an error
};

// Tensors and storages that must be as they were. Their owner keeps them and these arrays.
typedef struct portakv_watch {
  void *const *tensors;      // the handle of each
  const int64_t *addresses;  // of the first byte of each
  int64_t count;
  void *const *storages;  // for each storage the handle of a tensor that has it
  const int64_t *sizes;   // the bytes of each
  int64_t storage_count;
  // aoti_torch_get_data_ptr and aoti_torch_get_storage_size of torch's stable interface.
  int (*address_of)(void *tensor, void **out);
  int (*storage_bytes)(void *tensor, int64_t *out);
} portakv_watch;

// A view that outlives the call, on the device of the kernels or in host memory that they reach.
typedef struct portakv_copy_view {
  const int64_t *form;       // words
  const int64_t *dtypes;     // for each kv the word of its dtype, 0 for bytes
  const int64_t *addresses;  // in memory of the host
  int64_t table;             // where the device reads them; 0: it cannot
  int64_t slots;
  const int64_t *spans;  // sorted, disjoint: the first byte and the byte past the last of each
  int64_t span_count;
  int64_t device_type;  // as DLPack numbers it
  int64_t device_id;
  int64_t writable;         // a copy may write it
  int64_t table_on_device;  // the device alone knows the addresses
  const portakv_watch *watch;  // its memory; null: that of raw addresses, which nothing shows
  int64_t entries;      // of the addresses
  int64_t entry_bytes;  // all bytes at each address; 0: unknown
  void *const *versions;  // the handles of tensors whose versions a copy raises that writes the view
  int64_t version_count;
} portakv_copy_view;

// The end of a copy: memory for its kernels, and an event after them. The caller keeps it, and gives
// it to one copy at a time.
typedef struct portakv_copy_end {
  uint64_t status;  // as for `portakv_rows_run`; it is used only if ids lie on the device
  void *event;      // recorded after the kernels; null: the work has ended when a launch returns
  // Functions of the driver: cuEventRecord and cuEventQuery, or others with their arguments.
  int (*record)(void *event, void *stream);
  int (*query)(void *event);
  const int64_t *word;  // where the host reads the status word
  portakv_link_fault fault;  // the core writes what a call of a link's driver refused
} portakv_copy_end;

// Functions that name the current stream of a device.
typedef struct portakv_current {
  int64_t device;  // its number
  // cuCtxGetDevice or hipGetDevice; null: the process has one device.
  int (*current_device)(int *device);
  // aoti_torch_get_current_cuda_stream of torch's stable interface.
  int (*current_stream)(int32_t device, void **stream);
  // cuStreamIsCapturing or hipStreamIsCapturing, which writes 0 if no graph captures the stream.
  int (*capturing)(void *stream, int *status);
} portakv_current;

// What launches the kernels of a device.
typedef struct portakv_executor {
  const portakv_kernels *kernels;
  const PortakvTorch *torch;
  const portakv_current *current;  // null: the core does not name the current stream
} portakv_executor;

// The copies between one form on a device and one in pinned memory. Strategies have the numbers of
// pick.h. Words are those of link.h and pick.h; a null means that the strategy is not prepared.
typedef struct portakv_crossings {
  portakv_executor by;     // its kernels are those of `zero_copy`
  const int64_t *plans[2];  // the CrossingPlan of `staged` and of `batched_memcpy`
  portakv_link *link;
  int64_t aside;           // see `Crossing`
  const int64_t *picked;   // PickedCopies; null: each copy takes the strategy `only`
  int64_t only;
  // Tokens of a unit, and limits of groups of units; see `portakv_runs_groups`.
  int64_t unit;
  int64_t src_limit;
  int64_t dst_limit;
  int64_t host_limit;
} portakv_crossings;

// The status words of a process, in batches of PORTAKV_WORDS. Its owner only adds batches.
enum { PORTAKV_WORDS = 64 };
typedef struct portakv_words {
  const int64_t *const *batches;
  int64_t count;
} portakv_words;

// The copies between registered caches and chunks.
typedef struct portakv_chunk_copies {
  portakv_executor by;  // without kernels the copies are only checked
  const portakv_copy_view *caches;
  // The layouts of chunks whose elements have 1, 2, 4, 8 and 16 bytes; null: unknown.
  const int64_t *layouts[5];
  const portakv_words *words;      // no copy is made while one of them reports an error
} portakv_chunk_copies;

// Return a function of Python, a new reference; null if the process has no interpreter. Python calls
// it with these arguments in their order, where pointers are integers:
//
// 0: copy between rows of caches, by slots, and a chunk from its first token on.
//   copies      a portakv_chunk_copies
//   store       1 from the caches to the chunk, 0 the other way
//   chunk       a tensor
//   ids         a list of integers, or a tensor of int32 or int64: a slot for each token
//   start, end  integers, the range of the ids that is copied; None as end: all from the start on
// 1: copy inside a device, between two views by the ids of either side, or None for consecutive
// tokens.
//   executor    a portakv_executor
//   src, dst    a portakv_copy_view each
//   src_ids, dst_ids
//   src_step, dst_step      tokens of an id; of a side without ids they do not matter
//   src_offset, dst_offset  tokens that are passed over
//   count       tokens, or TO_THE_END of the ids
// 6: copy between a device and pinned memory, by ids on the host.
//   crossings   a portakv_crossings
//   src .. count  as of 1
//   costs, out  for the pick; see `portakv_pick_copy`
//   flags       1 if the ids are new, plus 2 if Python has to look at the host's memory before a
//               kernel reaches it: `zero_copy` is then not prepared
//   uncrossed   an Uncrossed (link.h); 0: no addresses are listed
//   staging     the StagingBuffers (link.h) of the stream; 0: `staged` is not prepared
// Then for all three
//   end         a portakv_copy_end; 0: one without an event
//   stream      a stream of the current device; None: the current one
// The function tells torch that the destination was written. It returns the tokens times 2^16, plus
// four times the answer of the pick, plus 2 if the status word may be written, plus 1 if ids of the
// host skip positions; or a code. Of 6 that may be PORTAKV_RUNS_EDGES or PORTAKV_LINK_ROOM: nothing
// was submitted. An event that the driver did not record is the driver's error.
//
// 2: ask whether the work before the event of an end, a portakv_copy_end, has ended. It returns the
// driver's answer, or PORTAKV_COPY_REPORTS.
//
// 3, 4: check a copy as of 1 and of 0 that a launch of Python makes.
//   torch, src .. count, or copies .. end; torch is a PortakvTorch
//   units, room     memory for the numbers of the units of the source, then of the destination, with
//                   room for so many of each; 0: the launch reads the ids
// The function returns a tuple: tokens, tokens of a unit, units without those that negative ids skip,
// and of 4 what `portakv_view_read_tensors` returns of the chunk; or a code. The numbers of a side
// without ids are written only if units are skipped. All units of ids on a device count: the launch
// judges the ids.
//
// 5, 7, 8, 9: `portakv_plan_make`, `portakv_pick_copy`, `portakv_view_read` and
// `portakv_form_slice` with their arguments.
PORTAKV_API void *portakv_python_function(int64_t number);

// Return 0 if a write of the first or the last byte of a range of host memory would fail. It is then
// mapped for reading only, or not at all, or is a page of a file that is shorter than its mapping.
// The kernel answers, and no byte changes. Return 1 where the call is unknown: on other systems than
// Linux, and under a filter of system calls.
PORTAKV_API int portakv_writable(int64_t first, int64_t past);

// --- Checksums --------------------------------------------------------------------------------
//
// XXH3 with 64 bits: the checksum in the images and tables of block stores.

// Return the checksum of bytes at any alignment.
PORTAKV_API uint64_t portakv_xxh3(const void *data, int64_t nbytes, uint64_t seed);

// Return the checksum of an object of Python with a contiguous buffer; without the interpreter if it
// has more than 64 KiB. The caller holds the interpreter. Return 0 with an error of Python for
// another object.
PORTAKV_API uint64_t portakv_xxh3_buffer(void *object, uint64_t seed);

// Write the checksums of pieces, each an offset from `base` and a number of bytes, to `out`.
PORTAKV_API void portakv_xxh3_pieces(const void *base, const int64_t *pieces, int64_t count,
                                     uint64_t seed, uint64_t *out);

// Return the same by the loop that every processor runs.
PORTAKV_API uint64_t portakv_xxh3_plain(const void *data, int64_t nbytes, uint64_t seed);

// --- Files ------------------------------------------------------------------------------------
//
// An engine moves bytes between open files and memory by its own threads, by io_uring or by plain
// calls. Until a request has ended, its file stays open, and its memory and what verifies it stay
// as they are. After a fork the child uses neither engines nor batches of its parent.

typedef struct portakv_io portakv_io;
typedef struct portakv_io_batch portakv_io_batch;

// The result of a read whose bytes have another checksum. Other results are the bytes that moved, or
// a negative errno.
enum { PORTAKV_IO_WRONG = -4096 };

// Other codes: all ends of a batch have been reported; the kernel's io_uring lacks what a ring uses.
enum { PORTAKV_IO_DONE = -1, PORTAKV_IO_OLD = -4097 };

// The calls of the system that an engine makes; each returns its result or a negative errno. Tests
// replace them.
typedef struct portakv_io_system {
  int64_t (*setup)(uint32_t entries, void *params);
  int64_t (*enter)(int fd, uint32_t put, uint32_t least, uint32_t flags);
  int64_t (*enroll)(int fd, uint32_t operation, const void *argument, uint32_t count);
  int64_t (*move)(int fd, void *address, int64_t nbytes, int64_t offset, int write);
  int64_t (*admit)(void);  // before a thread starts: 0 admits it
} portakv_io_system;

// The registered memory and the system stay until the engine was released.
typedef struct portakv_io_terms {
  int64_t ring;                     // 1: io_uring, and plain calls for what it cannot do
  int64_t depth;                    // the most requests of a batch under way
  const int64_t *memory;            // an address and a length of each part to register
  int64_t parts;                    // of memory
  const portakv_io_system *system;  // NULL: the system's own
} portakv_io_terms;

typedef struct portakv_io_state {
  int64_t registered;  // 0, or the negative errno for which no memory is registered
  int64_t refused;     // 0, or the negative errno for which a ring could not be replaced
  int64_t rings;       // that were made
  int64_t movers;      // threads that make plain calls
} portakv_io_state;

// Return an engine; or NULL with a negative errno in `code`, ENOTSUP on another system than Linux, or
// PORTAKV_IO_OLD.
PORTAKV_API portakv_io *portakv_io_open(const portakv_io_terms *terms, int64_t *code);

PORTAKV_API void portakv_io_look(portakv_io *io, portakv_io_state *out);

// Begin requests. A closed engine ends them with -ECANCELED.
//
// batch     gets the batch before any request begins; the caller releases it
// requests  for each: descriptor, offset in the file, address, bytes, 1 to write
// checks    NULL, or for each: base, pieces (an offset from the base and a length each), their
//           number (0: none are checked), seed, checksums
// each      1: report each end at once; 0: all of them together
// Return 0, or PORTAKV_NO_MEMORY; then nothing began.
PORTAKV_API int portakv_io_begin(portakv_io *io, portakv_io_batch **batch, const int64_t *requests,
                                 const int64_t *checks, int64_t count, int each);

// Wait for ends, write the number of the request and the result of each new one, and return how many
// there are. Wait up to `milliseconds`; -1: without a limit. Return 0 after that time, and after a
// signal; PORTAKV_IO_DONE if all ends have been reported.
PORTAKV_API int64_t portakv_io_wait(portakv_io_batch *batch, int64_t *ends, int64_t room,
                                    int64_t milliseconds);

// End all requests that have not begun with -ECANCELED.
PORTAKV_API void portakv_io_cancel(portakv_io *io, portakv_io_batch *batch);

PORTAKV_API void portakv_io_release(portakv_io_batch *batch);

// End an engine and its threads: requests under way end as they would, others with -ECANCELED. It
// may be called more than once. `free` also releases the engine.
PORTAKV_API void portakv_io_close(portakv_io *io);
PORTAKV_API void portakv_io_free(portakv_io *io);

// Close the descriptors that a forked child has of its parent's engine.
PORTAKV_API void portakv_io_forked(portakv_io *io);

#ifdef __cplusplus
}
#endif

#endif
