#!/usr/bin/env bash
# Everything that waits for a GPU, on a lent machine, in under ten minutes: the Triton kernels' tests, every bar, a training run,
# fla's gated delta rule, and, as far as the time reaches, the kernels' sizes. From the root of a copy of the tree that carries
# .gpu (make gpu-pack, and make gpu-cache, without which most of the time goes into compiling):
#   bash .ci/gpu_session.sh COMMIT [SECONDS [PARTS]]      PARTS: of "tests bench run fla tune", all if not given
# Results lie in $OUT: what each part printed, record-cuda.*, and files.tar.gz with the run and the tuning.
set -uo pipefail
commit=${1:?the commit that the tree is of} stop=$((SECONDS + ${2:-560})) parts=${3:-tests bench run fla tune} out=${OUT:?}
touch "$out/begun"
tar xJf .gpu/site.tar.xz -C .gpu || exit 1
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/.gpu/site RECIPELIN_HOME=$PWD/.gpu/home
[ -d /tmp/triton ] && export PYTHONPATH=/tmp/triton:$PYTHONPATH # in the place of the machine's (gpu_pack.py)
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, triton.__file__)'
if [ -f .gpu/cache.tar.xz ]; then
  export TRITON_CACHE_DIR=$PWD/.gpu/cache
  mkdir -p "$TRITON_CACHE_DIR" && tar xJf .gpu/cache.tar.xz -C "$TRITON_CACHE_DIR" || exit 1
  find "$TRITON_CACHE_DIR" -name '__grp__*.json' -exec sed -i "s#@CACHE@#$TRITON_CACHE_DIR#g" {} +
  echo "kernels compiled before: $(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l)"
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

part() { # NAME, SECONDS at most, command
  local name=$1 most=$2 begun=$SECONDS
  shift 2
  [[ " $parts " == *" $name "* ]] || return
  ((stop - SECONDS < most)) && most=$((stop - SECONDS))
  ((most < 10)) && { echo "== $name: no time left"; return; }
  # Interrupted, tests name what failed, and a bench says what it has measured.
  timeout -s INT -k 10 "$most" "$@" > "$out/$name.txt" 2>&1
  echo "== $name: exit $? after $((SECONDS - begun)) of $most s"
  tail -n "${LINES_SHOWN:-6}" "$out/$name.txt" | cut -c1-300
}

# -W default: warnings of this machine's versions are no errors here. -v: a test that failed is named at once.
LINES_SHOWN=40 part tests 250 env RECIPELIN_TEST_GPU=1 python3 -m pytest -v -rfE --tb=short -W default -p no:cacheprovider \
  --maxfail=12 -n "$(nproc)" tests/kernels/test_*_gpu*.py tests/kernels/on_gpu_*.py
grep -c PASSED "$out/tests.txt"
grep FAILED "$out/tests.txt" | sort -u | cut -c1-200
LINES_SHOWN=40 part bench 170 python3 -m recipelin bench --device cuda --write
printf 'extends: ../recipes/pocket/lolcats.yaml\nname: lolcats-gpu\nmethod: {form: {kernel: gpu}}\n' > .gpu/lolcats-gpu.yaml
[ -f .gpu/cache.tar.xz ] && echo "kernels now: $(find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l)"
# Neither is timed: side by side. A process of fla's tests took 7 GB of the GPU, one 16.
part run 200 python3 -m recipelin run .gpu/lolcats-gpu.yaml --device cuda --out .gpu/run &
LINES_SHOWN=12 part fla 200 env RECIPELIN_TEST_GPU=1 python3 -m pytest -v -rfE --tb=short -W default -p no:cacheprovider \
  -n 4 tests/kernels/on_fla_gated_delta.py &
wait
part tune 600 python3 .ci/gpu_tune.py --jobs "$(nproc)"

# What was written since: the machine's repository, if it has one, is of the commit that the session began with.
for file in kernels/bench/{record-cuda.{md,json},tuning-*.md}; do
  [ "$file" -nt "$out/begun" ] && sed -E -e "s/commit (unknown|[0-9a-f]{40}( with changes)?)/commit $commit/" \
    -e "s/\"commit\": [^,]*/\"commit\": \"$commit\"/" -e 's/"dirty": true/"dirty": false/' "$file" > "$out/${file##*/}"
done
tar czf "$out/files.tar.gz" .gpu/run kernels/bench/tuning-* 2> /dev/null
ls -la "$out"
