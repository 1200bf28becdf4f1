# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
# Bugs that run.sh seeds into the kernel's text (rows.h): a description and a sed command each. The
# kernel matrix, on the emulation, must fail with each. The emulation reports copies that break the
# API's rules; the bytes show wrong places.
MUTANTS=(
    "stores without waiting for the load"          's/\(tile = tiles_\.\)DeQue/\1AllocTensor/'
    "a tile is never enqueued"                     's/^ *tiles_\.EnQue(tile);//'
    "a tile is never freed"                        's/^ *tiles_\.FreeTensor(tile);//'
    "one buffer too large for UB"                  's|/ kBuffers / kAlign|/ kAlign|'
    "room for the status word forgotten"           's/(ub_bytes - kAlign) \/ kBuffers/ub_bytes \/ kBuffers/'
    "rows of a part lie without padding"           's/part_rows_ \* Padded(part_run_)/part_rows_ * part_run_/'
    "more parts than a tile holds"                 's/per_tile_ = tile_bytes_ \/ part_bytes_/per_tile_ = tile_bytes_ \/ part_bytes_ + 1/'
    "plain copies of any length"                   's/(address | bytes | gap) % kAlign == 0/(address | gap) % kAlign == 0/'
    "plain copies over any gap"                    's/(address | bytes | gap) % kAlign == 0/(address | bytes) % kAlign == 0/'
    "gaps of more than 16 bits"                    's/ && gap \/ kAlign <= kMostGap//'
    "more rows than 12 bits count"                 's/kMostRows = 4095/kMostRows = 8192/'
    "more rows than one of a cut run"              's/if (run_parts_ > 1) part_rows_ = 1;/if (run_parts_ > 1) part_rows_ = 2;/'
    "a stride taken for a gap"                     's/stride - part.bytes : 0/stride : 0/'
    "the strides of both sides exchanged"          's/Gap(part, nest_.src_stride)/Gap(part, nest_.dst_stride)/'
    "negative ids are not skipped"                 's/if (id < 0) return false;//'
    "ids past the end are moved"                   's/if (number < request.limit) return true;/return true;/'
    "wild ids are multiplied"                      's/if (id > request.limit \/ side.per_id)/if (false)/'
    "ids are always int64"                         's/if (request.wide)/if (true)/'
    "ids are always int32"                         's/if (request.wide)/if (false)/'
    "a bad id is never reported"                   's/if (bad \&\& reports) Report/if (false) Report/'
    "a bad id is reported by its unit"             's/Report(unit \* nest_.unit + 1)/Report(unit + 1)/'
    "the status word is not announced"             's/^ *AscendC::SetFlag<.*$//;s/^ *AscendC::WaitFlag<.*$//'
    "every core begins at the first part"          's/begin_ = share \* AscendC::GetBlockIdx()/begin_ = 0 * AscendC::GetBlockIdx()/'
    "no core moves the last parts"                 's/(parts + AscendC::GetBlockNum() - 1)/parts/'
    "the last rows are left out"                   's/part.rows = nest_.rows - row < part_rows_ ? nest_.rows - row/part.rows = nest_.rows - row < part_rows_ ? 1/'
    "one layer for all"                            's/src_entry += step \* loop.src_table;//'
    "the table's base is forgotten"                's/ + request.base;/;/'
    "a unit's number walks one step"               's/if (step.extent) number \/= step.extent;//'
    "a unit is looked up once for both"            's/FindNumber(nest_.dst, dst_,/FindNumber(nest_.dst, src_,/'
)
