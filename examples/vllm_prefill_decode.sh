#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compute two prompts in a prefill engine of vLLM, and go on with them in decode engines, whose blocks have another
# size: the first one pulls the rows of its prompt. While the second one pulls, the prefill engine is killed by
# SIGKILL, and the decode engine computes the prompt. The tokens are the same.
#     bash examples/vllm_prefill_decode.sh [FOLDER] [--model NAME]
set -euo pipefail
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
rm -f "$folder"/[01].json
shift $(($# > 0))
example=$(dirname "${BASH_SOURCE[0]}")/vllm_prefill_decode.py
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind

# wait_for TEXT FILE PROCESS: wait until a process has written a text.
wait_for() {
    until grep -q "$1" "$2"; do
        kill -0 "$3" 2>/dev/null || { wait "$3"; exit 1; }
        sleep 0.2
    done
}

python "$example" prefill "$folder" "$@" >"$folder/prefill" &
prefill=$!
trap 'kill -9 "$prefill" 2>/dev/null || true' EXIT
until [[ -e $folder/1.json ]]; do
    kill -0 "$prefill" 2>/dev/null || { wait "$prefill"; exit 1; }
    sleep 1
done
python "$example" decode "$folder" 0 "$@" >"$folder/first"

python "$example" decode "$folder" 1 --max-gbps 0.0002 "$@" >"$folder/second" &
decode=$!
wait_for pulling "$folder/second" "$decode"
sleep 2
kill -9 "$prefill"
wait "$prefill" 2>/dev/null || echo "The prefill engine was killed while the second decode engine pulls."
wait "$decode"

python - "$folder" <<'END'
import json, sys
own, first, second = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}") if line[0] == "{"]
                      for name in ("prefill", "first", "second"))
print("first: ", first[0])
print("second:", second[0])
assert [each["tokens"] for each in own] == [first[0]["tokens"], second[0]["tokens"]], "the tokens differ"
assert first[0]["pulled"] == 1000, "the first decode engine computed its prompt"
assert second[0]["pulled"] == 0, "the second decode engine pulled all rows before the end of the prefill engine"
print("The same tokens as those of the prefill engine; the second decode engine computed its prompt.")
END
