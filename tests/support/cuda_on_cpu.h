// SPDX-License-Identifier: Apache-2.0
// Where the kernel prefetched: tests/support/cuda_on_cpu.py has it call `touch` in place of the instruction.
#pragma once

static const void* touched[1 << 12];
static unsigned touches;
[[maybe_unused]] static void touch(const void* address) {
    if (touches < sizeof touched / sizeof *touched) touched[touches++] = address;
}
