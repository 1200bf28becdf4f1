// SPDX-License-Identifier: Apache-2.0
// The row copy by bulk transfers (Hopper and later): a ring of tiles in shared memory keeps all of
// it in flight. On an H200 this is the faster way below about 50 MB, where the vector kernel has
// too few bytes in flight at its start and end.
//
// One warp is a block. A tile holds pieces of equal size; a lane moves one piece of each tile:
// global -> shared, then shared -> global, ordered by an mbarrier for each stage of the ring.
#pragma once

#include "rows.cuh"

namespace portakv {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void wait_for_phase(unsigned barrier, unsigned phase) {
    unsigned done;
    do {
        asm volatile(
            "{ .reg .pred p;\n"
            "  mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "  selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
    } while (!done);
}

template <unsigned Piece, unsigned PerRun, unsigned PerTile, unsigned Stages,
          class Inner, class Outer, class Src, class Dst>
__device__ __forceinline__ void copy_rows_bulk(const CopyOf<Src, Dst>& copy) {
    constexpr unsigned per_unit = Inner::product * PerRun;  // pieces of one unit in one plane
    __shared__ alignas(128) char ring[Stages][PerTile * Piece];
    __shared__ alignas(8) u64 arrived[Stages];
    __shared__ char* targets[Stages][PerTile];
    const unsigned lane = threadIdx.x;
    const unsigned per_plane = copy.units * per_unit;
    const unsigned pieces = per_plane * Outer::product;
    const unsigned tiles = (pieces + PerTile - 1) / PerTile;
    if (lane == 0) {
        for (unsigned s = 0; s < Stages; ++s)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrived[s])));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();

    auto load = [&](unsigned turn) {
        const unsigned tile = blockIdx.x + turn * gridDim.x;
        if (tile >= tiles) return;
        const unsigned stage = turn % Stages;
        const unsigned barrier = shared_address(&arrived[stage]);
        const unsigned at = tile * PerTile + lane;
        if (lane < PerTile) {
            char *src = nullptr, *dst = nullptr;
            if (at < pieces) {
                const unsigned plane = at / per_plane, rest = at % per_plane;
                const unsigned in = rest % per_unit;
                const i64 byte = (i64)(in % PerRun) * Piece;
                if (both_addresses<Outer, Inner>(copy, copy.start + rest / per_unit, plane, in / PerRun,
                                                 in == 0, src, dst)) {
                    src += byte;
                    dst += byte;
                    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
                                 ::"r"(barrier), "r"(Piece) : "memory");
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                        ::"r"(shared_address(&ring[stage][lane * Piece])), "l"(src), "r"(Piece), "r"(barrier)
                        : "memory");
                }
            }
            targets[stage][lane] = dst;
        }
        __syncwarp();
        if (lane == 0)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    };

    for (unsigned turn = 0; turn < Stages; ++turn) load(turn);
    for (unsigned turn = 0; blockIdx.x + turn * gridDim.x < tiles; ++turn) {
        const unsigned stage = turn % Stages;
        wait_for_phase(shared_address(&arrived[stage]), (turn / Stages) & 1);
        if (lane < PerTile) {
            char* dst = targets[stage][lane];
            if (dst)
                asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                             ::"l"(dst), "r"(shared_address(&ring[stage][lane * Piece])), "r"(Piece)
                             : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            // The stage before this one is free once its bytes have been read out.
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        }
        __syncwarp();
        if (turn) load(turn - 1 + Stages);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace portakv
