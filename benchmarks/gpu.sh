#!/usr/bin/env bash
# Builds, tests and measures fastconv on a machine with a GPU, offline, in slices of a few minutes:
#   benchmarks/gpu.sh OUT_DIR [SLICE...]        (no slice named: all, in the order below)
# A slice that went well leaves OUT_DIR/SLICE.done and is not run again; one that failed or ran out
# of time is run by the next call, and never stops the ones after it. Each leaves SLICE.log and
# SLICE.json; summary.json says what stands, on which machine, with which versions.
#   PYTHON  interpreter that has torch (default: python3)
#   LIMIT   seconds after which no slice is begun and the running one is ended (default: no limit)
set -uo pipefail
exec </dev/null
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
python=${PYTHON:-python3}
limit=${LIMIT:-1000000}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
PATH=$CUDA_HOME/bin:$PATH

test_files=(cuda alignment fused_pool batch_norm pooling conv2d_kernels autograd derivatives
  torch_func modules pytorch_samples seed_facts choice geometry_hypothesis bad_input lenet
  triton_rows triton_host triton_runtime triton_autotune triton_networks tf32 autotuning)
tools=(memcheck racecheck synccheck)
benches=(bfloat16 float16 tf32 float32 fused choice bfloat16-more float16-more tf32-more float32-more
  triton inductor other)
slices=(build resources sass instructions smoke "${test_files[@]/#/tests-}"
  "${tools[@]/#/sanitizer-}" "${benches[@]/#/bench-}")

# Seconds that each slice may take.
limit_of() {
  case $1 in
    build) echo 900 ;;
    instructions | bench-*) echo 420 ;;
    *) echo 300 ;;
  esac
}

slice_build() { # every kernel's registers and spills are in this log
  FASTCONV_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} NVCC_APPEND_FLAGS="-Xptxas=-v,-warn-spills" \
    "$python" setup.py build_ext --inplace
}

slice_resources() {
  "$python" benchmarks/kernel_resources.py "$out/build.log" --json "$out/kernels.json"
}

# HGMMA in the sm_90a kernels, HMMA in the sm_80 ones, 16-byte accesses, no local memory.
slice_sass() {
  "$python" benchmarks/kernel_sass.py fastconv/_C*.so --json "$out/sass-kernels.json"
}

# What each PTX instruction does, by hardware: the cases that the emulator is tested with.
slice_instructions() {
  local program=$out/instructions failed=0 cases case seed
  if [ ! -x "$program" ] || [ -n "$(find csrc tests/emulator -newer "$program" -name '*.[ch]*')" ]; then
    nvcc -std=c++17 -O1 -arch=sm_90a -Icsrc -Itests/emulator tests/emulator/cases.cu \
      tests/emulator/instructions_*.cu -o "$program" || return 1
  fi
  cases=$("$program") && [ -n "$cases" ] || return 1
  for case in $cases; do
    for seed in 0 1 2; do
      if timeout 60 "$program" "$case" "$seed"; then
        echo "ok     $case, seed $seed"
      else
        echo "WRONG  $case, seed $seed"
        failed=1
      fi
    done
  done
  return $failed
}

slice_smoke() {
  "$python" -m fastconv info && "$python" benchmarks/gpu_rows.py
}

slice_tests() { # FILE
  local select=() compiler=${CXX:-c++}
  case $1 in
    # These loop over the whole table inside a test; without a C++ compiler the emulator's rows,
    # which would take most of the time, are not in it.
    batch_norm | pooling) compiler=none ;;
    conv2d_kernels) select=(-k "sm80 or sm90 or cuda or triton") compiler=none ;;
    alignment | fused_pool) select=(-k "not emulat") ;;
    autograd | derivatives | torch_func | modules) select=(-k cuda) ;;
  esac
  CXX=$compiler "$python" -m pytest -q -p no:cacheprovider "tests/test_$1.py" "${select[@]}" \
    --junitxml "$out/tests-$1.xml"
}

slice_sanitizer() { # TOOL
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return 3; }
  local program=$out/instructions status=0
  local sanitize=(compute-sanitizer --tool "$1" --error-exitcode 9)
  "${sanitize[@]}" --target-processes all "$python" benchmarks/gpu_rows.py --small || status=1
  if [ -x "$program" ]; then "${sanitize[@]}" "$program" all 0 || status=1; fi
  return $status
}

slice_bench() { # WHAT: see gpu_bench.py
  "$python" benchmarks/gpu_bench.py "$1" --json "$out/bench-$1-figures.json"
}

run() { # SLICE, inside a process of its own that `timeout` can end
  case $1 in
    tests-*) slice_tests "${1#tests-}" ;;
    sanitizer-*) slice_sanitizer "${1#sanitizer-}" ;;
    bench-*) slice_bench "${1#bench-}" ;;
    *) "slice_$1" ;;
  esac
}

# note SLICE STATUS SECONDS: SLICE.json; the last line of the log is kept, since tests count there.
note() {
  NOTE_LAST=$(tail -n 1 "$out/$1.log" 2>/dev/null) "$python" - "$@" >"$out/$1.json" <<'PYTHON'
import json, os, sys, time

name, status, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
said = {0: "ok", 3: "left out", 124: "out of time"}.get(status, "failed")
finished = time.strftime("%Y-%m-%d %H:%M:%S %z")
print(json.dumps({"slice": name, "status": said, "exit": status, "seconds": seconds,
                  "finished": finished, "last_line": os.environ["NOTE_LAST"]}, indent=1))
PYTHON
}

summary() {
  "$python" - "$out" "${slices[@]}" <<'PYTHON'
import json, platform, subprocess, sys
from pathlib import Path

out, names = Path(sys.argv[1]), sys.argv[2:]
facts = {"python": platform.python_version(), "platform": platform.platform()}
try:
    import torch

    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version(),
              "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
except Exception as error:
    facts["torch"] = f"{type(error).__name__}: {error}"
for name, command in {
    "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    "nvcc": ["nvcc", "--version"],
    "commit": ["git", "rev-parse", "HEAD"],
}.items():
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
        facts[name] = said[-1] if said else ""
    except OSError:
        facts[name] = ""
rows = []
for name in names:
    file = out / f"{name}.json"
    try:
        rows.append(json.loads(file.read_text()))
    except (OSError, ValueError):
        rows.append({"slice": name, "status": "not run", "seconds": 0, "last_line": ""})
(out / "summary.json").write_text(json.dumps({"machine": facts, "slices": rows}, indent=1) + "\n")
print("=" * 72)
for key, value in facts.items():
    print(f"{key:<10} {value}")
for row in rows:
    print(f"{row['slice']:<22} {row['status']:<12} {row['seconds']:>5} s  {row['last_line'][:90]}")
PYTHON
}

if [ "${1:-}" = --run ]; then # what the loop below calls
  run "$2"
  exit
fi

wanted=("${slices[@]}")
if [ $# -gt 0 ]; then wanted=("$@"); fi
for slice in "${wanted[@]}"; do
  case " ${slices[*]} " in
    *" $slice "*) ;;
    *) echo "no slice $slice; there are: ${slices[*]}" >&2 && exit 2 ;;
  esac
done
failures=0
for slice in "${wanted[@]}"; do
  if [ -e "$out/$slice.done" ]; then
    echo "=== $slice: done before"
    continue
  fi
  left=$((limit - SECONDS)) allowed=$(limit_of "$slice") status=0
  if [ "$left" -lt 30 ]; then
    echo "=== $slice: not begun, $left s are left"
    failures=$((failures + 1))
    continue
  fi
  echo "=== $slice"
  began=$SECONDS
  timeout --kill-after=10 "$((left < allowed ? left : allowed))" \
    "$BASH" "$here/gpu.sh" "$out" --run "$slice" >"$out/$slice.log" 2>&1 || status=$?
  note "$slice" "$status" $((SECONDS - began))
  if [ "$status" -eq 0 ]; then
    touch "$out/$slice.done"
  else
    failures=$((failures + 1))
    tail -n 15 "$out/$slice.log"
  fi
  echo "=== $slice: status $status after $((SECONDS - began)) s"
done
summary
exit $((failures > 0))
