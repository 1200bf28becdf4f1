// SPDX-License-Identifier: Apache-2.0
// PortaKV's primitive in AscendC: copy rows between two views under an index on either side.
//
// Gather and scatter are this one kernel with the sides exchanged. Each vector core takes an equal
// share of all parts; a tile of parts goes GM -> UB -> GM through one queue of two buffers, so that
// the next tile is loaded while the last one is stored. A part is up to `part_rows_` rows of up to
// `part_run_` bytes, moved by one transfer in and one out.
//
// No launch syntax and no vendor type beyond AscendC's own: this text compiles under bisheng, in
// CANN's CPU twin, and with g++ against emulation/kernel_operator.h.
#pragma once
#include "copy.h"
#include "kernel_operator.h"

namespace portakv {

constexpr int64_t kAlign = 32;         // bytes: addresses in UB, and lengths of plain copies
constexpr int64_t kMostRows = 4095;    // of one transfer: 12 bits
constexpr int64_t kMostRun = 2097120;  // bytes of a row: 65535 blocks of 32
constexpr int64_t kMostGap = 65535;    // blocks of 32 bytes between rows of a plain copy
constexpr int kBuffers = 2;

class Rows {
public:
    // The pipe stands outside of this class, as the vendor's guide advises: inside it would keep the
    // compiler from folding the members that are scalars.
    __aicore__ inline void Init(
        AscendC::TPipe* pipe, GM_ADDR nest, const Request& src, const Request& dst, int64_t units,
        GM_ADDR status, uint32_t ub_bytes) {
        pipe_ = pipe;
        ReadNest(nest);
        src_ = src;
        dst_ = dst;
        status_ = status;
        CutParts(ub_bytes);
        planes_ = 1;
        for (int64_t at = 0; at < nest_.loops; ++at) planes_ *= nest_.loop[at].extent;
        const int64_t parts = units * planes_ * parts_;
        const int64_t share = (parts + AscendC::GetBlockNum() - 1) / AscendC::GetBlockNum();
        begin_ = share * AscendC::GetBlockIdx();
        end_ = begin_ + share < parts ? begin_ + share : parts;
        pipe_->InitBuffer(tiles_, kBuffers, static_cast<uint32_t>(tile_bytes_));
        pipe_->InitBuffer(word_, static_cast<uint32_t>(kAlign));
    }

    __aicore__ inline void Process() {
        for (int64_t first = begin_; first < end_; first += per_tile_) {
            const int64_t past = first + per_tile_ < end_ ? first + per_tile_ : end_;
            Load(first, past);
            Store(first, past);
        }
    }

private:
    // One rectangle of bytes: its addresses on both sides, and its size.
    struct Part {
        int64_t src, dst;  // addresses
        int64_t rows, bytes;
    };

    __aicore__ inline void ReadNest(GM_ADDR nest) {
        AscendC::GlobalTensor<int64_t> words;
        words.SetGlobalBuffer((__gm__ int64_t*)nest, sizeof(Nest) / sizeof(int64_t));
        int64_t* into = reinterpret_cast<int64_t*>(&nest_);
        for (uint64_t at = 0; at < sizeof(Nest) / sizeof(int64_t); ++at)
            into[at] = words.GetValue(at);
    }

    // How a run and its rows are cut so that parts fit a buffer.
    __aicore__ inline void CutParts(uint32_t ub_bytes) {
        tile_bytes_ = (ub_bytes - kAlign) / kBuffers / kAlign * kAlign;
        const int64_t most = tile_bytes_ < kMostRun ? tile_bytes_ : kMostRun;
        part_run_ = nest_.run < most ? nest_.run : most;
        run_parts_ = (nest_.run + part_run_ - 1) / part_run_;
        const int64_t fit = tile_bytes_ / Padded(part_run_);
        part_rows_ = nest_.rows < fit ? nest_.rows : fit;
        if (part_rows_ > kMostRows) part_rows_ = kMostRows;
        if (run_parts_ > 1) part_rows_ = 1;  // a cut run leaves gaps that a transfer cannot name
        parts_ = run_parts_ * ((nest_.rows + part_rows_ - 1) / part_rows_);
        part_bytes_ = part_rows_ * Padded(part_run_);
        per_tile_ = tile_bytes_ / part_bytes_;
    }

    __aicore__ inline void Load(int64_t first, int64_t past) {
        AscendC::LocalTensor<uint8_t> tile = tiles_.AllocTensor<uint8_t>();
        Part part;
        for (int64_t at = first; at < past; ++at)
            if (FindPart(at, part)) LoadPart(tile[(at - first) * part_bytes_], part);
        tiles_.EnQue(tile);
    }

    // Compute the places again instead of storing them: the ids come from the cache.
    __aicore__ inline void Store(int64_t first, int64_t past) {
        AscendC::LocalTensor<uint8_t> tile = tiles_.DeQue<uint8_t>();
        Part part;
        for (int64_t at = first; at < past; ++at)
            if (FindPart(at, part)) StorePart(tile[(at - first) * part_bytes_], part);
        tiles_.FreeTensor(tile);
    }

    // Rows lie in UB at multiples of 32 bytes without further gaps, in and out alike.
    __aicore__ inline void LoadPart(const AscendC::LocalTensor<uint8_t>& into, const Part& part) {
        AscendC::GlobalTensor<uint8_t> from = Global(part.src, part, nest_.src_stride);
        const int64_t gap = Gap(part, nest_.src_stride);
        const uint16_t rows = static_cast<uint16_t>(part.rows);
        if (IsPlain(part.src, part.bytes, gap)) {
            AscendC::DataCopy(into, from, AscendC::DataCopyParams(
                rows, static_cast<uint16_t>(part.bytes / kAlign),
                static_cast<uint16_t>(gap / kAlign), 0));
        } else {
            AscendC::DataCopyPad(into, from, AscendC::DataCopyExtParams(
                rows, static_cast<uint32_t>(part.bytes), static_cast<uint32_t>(gap), 0, 0),
                AscendC::DataCopyPadExtParams<uint8_t>(false, 0, 0, 0));
        }
    }

    __aicore__ inline void StorePart(const AscendC::LocalTensor<uint8_t>& from, const Part& part) {
        AscendC::GlobalTensor<uint8_t> into = Global(part.dst, part, nest_.dst_stride);
        const int64_t gap = Gap(part, nest_.dst_stride);
        const uint16_t rows = static_cast<uint16_t>(part.rows);
        if (IsPlain(part.dst, part.bytes, gap)) {
            AscendC::DataCopy(into, from, AscendC::DataCopyParams(
                rows, static_cast<uint16_t>(part.bytes / kAlign), 0,
                static_cast<uint16_t>(gap / kAlign)));
        } else {
            AscendC::DataCopyPad(into, from, AscendC::DataCopyExtParams(
                rows, static_cast<uint32_t>(part.bytes), 0, static_cast<uint32_t>(gap), 0));
        }
    }

    static __aicore__ inline AscendC::GlobalTensor<uint8_t> Global(
        int64_t address, const Part& part, int64_t stride) {
        AscendC::GlobalTensor<uint8_t> rows;
        const int64_t span = (part.rows - 1) * stride + part.bytes;
        rows.SetGlobalBuffer((__gm__ uint8_t*)address, static_cast<uint64_t>(span));
        return rows;
    }

    // Bytes from the end of a row to the next one.
    static __aicore__ inline int64_t Gap(const Part& part, int64_t stride) {
        return part.rows > 1 ? stride - part.bytes : 0;
    }

    static __aicore__ inline bool IsPlain(int64_t address, int64_t bytes, int64_t gap) {
        return (address | bytes | gap) % kAlign == 0 && gap / kAlign <= kMostGap;
    }

    static __aicore__ inline int64_t Padded(int64_t bytes) {
        return (bytes + kAlign - 1) / kAlign * kAlign;
    }

    // The rectangle of a part; false if it is not moved.
    __aicore__ inline bool FindPart(int64_t at, Part& part) {
        const int64_t in = at % parts_, above = at / parts_;
        const int64_t plane = above % planes_;
        FindUnit(above / planes_, plane == 0 && in == 0);
        if (!moved_) return false;
        int64_t src_entry = src_entry_, dst_entry = dst_entry_;
        part.src = src_bytes_;
        part.dst = dst_bytes_;
        int64_t rest = plane;
        for (int64_t nth = nest_.loops - 1; nth >= 0; --nth) {
            const Loop& loop = nest_.loop[nth];
            const int64_t step = rest % loop.extent;
            rest /= loop.extent;
            src_entry += step * loop.src_table;
            dst_entry += step * loop.dst_table;
            part.src += step * loop.src_stride;
            part.dst += step * loop.dst_stride;
        }
        const int64_t row = in / run_parts_ * part_rows_, byte = in % run_parts_ * part_run_;
        part.rows = nest_.rows - row < part_rows_ ? nest_.rows - row : part_rows_;
        part.bytes = nest_.run - byte < part_run_ ? nest_.run - byte : part_run_;
        part.src += Origin(src_, src_entry) + row * nest_.src_stride + byte;
        part.dst += Origin(dst_, dst_entry) + row * nest_.dst_stride + byte;
        return true;
    }

    static __aicore__ inline int64_t Origin(const Request& request, int64_t entry) {
        if (request.table == 0) return request.base;
        AscendC::GlobalTensor<int64_t> table;
        table.SetGlobalBuffer((__gm__ int64_t*)request.table);
        return table.GetValue(static_cast<uint64_t>(entry)) + request.base;
    }

    // The place of a unit on both sides, cached for all its parts. Only the core that has a unit's
    // first part reports that its id is bad.
    __aicore__ inline void FindUnit(int64_t unit, bool reports) {
        if (unit == unit_) return;
        unit_ = unit;
        int64_t from = 0, to = 0;
        bool bad = false;
        const bool read = FindNumber(nest_.src, src_, unit, from, bad);
        const bool write = FindNumber(nest_.dst, dst_, unit, to, bad);
        moved_ = read && write;
        if (bad && reports) Report(unit * nest_.unit + 1);
        if (!moved_) return;
        Walk(nest_.src, from, src_entry_, src_bytes_);
        Walk(nest_.dst, to, dst_entry_, dst_bytes_);
    }

    // The number of a unit on one side; false if it is skipped or past the end (then `bad`).
    static __aicore__ inline bool FindNumber(
        const Side& side, const Request& request, int64_t unit, int64_t& number, bool& bad) {
        const int64_t at = request.first + unit;
        number = at;
        if (side.per_id == 0) return true;
        const int64_t id = ReadId(request, at / side.per_id);
        if (id < 0) return false;
        // Compared before it is multiplied: no id, however large, can overflow.
        if (id > request.limit / side.per_id) {
            bad = true;
            return false;
        }
        number = id * side.per_id + at % side.per_id;
        if (number < request.limit) return true;
        bad = true;
        return false;
    }

    static __aicore__ inline int64_t ReadId(const Request& request, int64_t at) {
        if (request.wide) {
            AscendC::GlobalTensor<int64_t> ids;
            ids.SetGlobalBuffer((__gm__ int64_t*)request.ids);
            return ids.GetValue(static_cast<uint64_t>(at));
        }
        AscendC::GlobalTensor<int32_t> ids;
        ids.SetGlobalBuffer((__gm__ int32_t*)request.ids);
        return ids.GetValue(static_cast<uint64_t>(at));
    }

    static __aicore__ inline void Walk(
        const Side& side, int64_t number, int64_t& entry, int64_t& bytes) {
        entry = side.table;
        bytes = side.offset;
        for (int64_t nth = side.steps - 1; nth >= 0; --nth) {
            const Step& step = side.units[nth];
            const int64_t at = step.extent ? number % step.extent : number;
            if (step.extent) number /= step.extent;
            entry += at * step.table;
            bytes += at * step.stride;
        }
    }

    // Write the status word through UB: a scalar store would write back a whole cache line, with
    // the bytes around the word. Each core writes its own word once, because a transfer may still read
    // the word in UB. A core takes its units in ascending order: its first bad one is the lowest.
    __aicore__ inline void Report(int64_t position) {
        if (reported_ || status_ == nullptr) return;
        reported_ = true;
        word_.Get<int64_t>().SetValue(0, position);
        const auto event =
            static_cast<event_t>(pipe_->FetchEventID(AscendC::HardEvent::S_MTE3));
        AscendC::SetFlag<AscendC::HardEvent::S_MTE3>(event);
        AscendC::WaitFlag<AscendC::HardEvent::S_MTE3>(event);
        AscendC::GlobalTensor<uint8_t> status;
        status.SetGlobalBuffer(
            (__gm__ uint8_t*)status_ + AscendC::GetBlockIdx() * sizeof(int64_t), sizeof(int64_t));
        AscendC::DataCopyPad(status, word_.Get<uint8_t>(),
                             AscendC::DataCopyExtParams(1, sizeof(int64_t), 0, 0, 0));
    }

    AscendC::TPipe* pipe_;
    AscendC::TQueBind<AscendC::TPosition::VECIN, AscendC::TPosition::VECOUT, 1> tiles_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> word_;
    Nest nest_;
    Request src_, dst_;
    GM_ADDR status_;
    int64_t begin_, end_;  // parts of this core
    int64_t planes_, parts_, run_parts_, part_run_, part_rows_;
    int64_t part_bytes_, tile_bytes_, per_tile_;
    int64_t unit_ = -1, src_entry_, src_bytes_, dst_entry_, dst_bytes_;
    bool moved_ = false, reported_ = false;
};

}  // namespace portakv

extern "C" __global__ __aicore__ void portakv_rows(
    GM_ADDR nest, int64_t src_table, int64_t src_base, int64_t src_ids, int64_t src_wide,
    int64_t src_first, int64_t src_limit, int64_t dst_table, int64_t dst_base, int64_t dst_ids,
    int64_t dst_wide, int64_t dst_first, int64_t dst_limit, int64_t units, GM_ADDR status,
    uint32_t ub_bytes) {
    const portakv::Request src = {
        src_table, src_base, src_ids, src_wide, src_first, src_limit};
    const portakv::Request dst = {
        dst_table, dst_base, dst_ids, dst_wide, dst_first, dst_limit};
    AscendC::TPipe pipe;
    portakv::Rows rows;
    rows.Init(&pipe, nest, src, dst, units, status, ub_bytes);
    rows.Process();
}

// The arguments above, in their order, out of a `Copy`.
#define PORTAKV_ROWS_ARGUMENTS(copy)                                                              \
    (GM_ADDR)(copy).nest, (copy).src.table, (copy).src.base, (copy).src.ids, (copy).src.wide,  \
    (copy).src.first, (copy).src.limit, (copy).dst.table, (copy).dst.base, (copy).dst.ids,     \
    (copy).dst.wide, (copy).dst.first, (copy).dst.limit, (copy).units, (GM_ADDR)(copy).status
