#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Check the configuration, and start vLLM if it has no error. The arguments are those of `vllm serve`.
set -euo pipefail
config=${PORTAKV_CONFIG:-/etc/portakv/kv.json}
portakv doctor --kv-transfer-config "$config"
exec vllm serve "$@" --kv-transfer-config "$(cat "$config")"
