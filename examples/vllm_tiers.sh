#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Answer a prompt with vLLM, kill the engine by SIGKILL, and answer it with a second engine, whose blocks have
# another size and which has two ranks of tensor parallelism: it loads the prompt's blocks from the disk, and
# answers the same tokens.
#     bash examples/vllm_tiers.sh [FOLDER] [--model NAME]
# RANKS=1: the second engine has one rank too, such as on a machine with one GPU.
# HYBRID=1: the model has layers with states; hits end where vLLM has kept one, and both engines have one rank.
set -euo pipefail
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
shift $(($# > 0))
example=$(dirname "${BASH_SOURCE[0]}")/vllm_tiers.py
least=960
if [[ -n ${HYBRID:-} ]]; then
    set -- --hybrid "$@"
    RANKS=1 least=480
fi
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind

python "$example" "$folder" --block-size 32 --wait "$@" >"$folder/first" &
engine=$!
until grep -q stored "$folder/first"; do
    kill -0 "$engine" 2>/dev/null || { wait "$engine"; exit 1; }
    sleep 1
done
kill -9 "$engine"
wait "$engine" 2>/dev/null || echo "The first engine was killed."
python "$example" "$folder" --block-size 64 --ranks "${RANKS:-2}" "$@" >"$folder/second"

python - "$folder" "$least" <<'END'
import json, sys
first, second = (json.loads(open(f"{sys.argv[1]}/{name}").readline()) for name in ("first", "second"))
print("first: ", first)
print("second:", second)
assert first["tokens"] == second["tokens"], "the tokens differ"
assert second["from the store"] >= int(sys.argv[2]), "the second engine computed the prompt"
print("The same tokens; the second engine computed the end of the prompt only.")
END
