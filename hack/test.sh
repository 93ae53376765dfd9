#!/bin/bash
# test.sh [STAGE [uml|qemu]]: run the tests, all stages without an argument.
# Each stage makes what it needs; each prints what it does and how long it took.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOTOOLCHAIN=local GOFLAGS="-buildvcs=false -trimpath" CGO_ENABLED=0
# A test whose prerequisite is missing fails instead of skipping.
export CI=true
export SLUICE_TEST_BEGAN=${SLUICE_TEST_BEGAN:-$(date +%s)}
mkdir -p out

# The packages that have functions whose names begin so.
with() { git grep --untracked -l "^func $1" -- '*_test.go' | xargs -n 1 dirname | sort -u | sed 's|^|./|'; }

say() { printf '\n=== [%4ds] %s\n' $(($(date +%s) - SLUICE_TEST_BEGAN)) "$*"; }

verify() {
  say "generated files are up to date"
  local before after
  before=$(git ls-files -s -o --exclude-standard apis config | sha256sum; git diff -- apis config | sha256sum)
  make --no-print-directory generate
  after=$(git ls-files -s -o --exclude-standard apis config | sha256sum; git diff -- apis config | sha256sum)
  if [ "$before" != "$after" ]; then
    git --no-pager diff --stat -- apis config
    echo "generated files differ: run 'make generate' and commit the result" >&2
    return 1
  fi
}

tools() {
  say "the lab's programs, and Debian's that tests call"
  go build -o out/ ./test/lab/cmd/lab ./test/lab/cmd/labrun
  out/lab programs
}

unit() {
  tools
  say "artefacts of the tests against a real API server and a real OVSDB"
  KUBEBUILDER_ASSETS=$(out/lab assets)
  SLUICE_OVS=$(out/lab ovs)
  export KUBEBUILDER_ASSETS SLUICE_OVS
  say "vet, with the tests of guests and clusters"
  go vet -tags lab,e2e ./... # no file is there only without them
  say "unit tests, tests against a real API server, tests on this kernel"
  # Many wait for a kernel or an API server most of their time.
  go test -p 4 -parallel 4 -timeout 30m ./...
}

# Every fuzz target there is, with so many inputs beyond its seeds. A count, because
# Go 1.26 now and then takes the end of a time limit for a failure.
fuzz() {
  export FUZZ=${FUZZ:-2000x} FUZZ_OUT=$PWD/out/fuzz FUZZ_CACHE
  unset KUBEBUILDER_ASSETS # or each process would start an API server, which no target asks for
  FUZZ_CACHE=$(go env GOCACHE)/fuzz/sluice
  say "fuzz targets, $FUZZ inputs each"
  local dir program own
  own=$(go list -m)/...
  for dir in $(with Fuzz); do
    program=$FUZZ_OUT/$dir/test
    # With the coverage counters that guide the search, in the project's own packages:
    # -fuzz would compile all others with them, too, which takes six times as long.
    go test -c -gcflags="$own=-d=libfuzzer" -o "$program" "$dir"
    "$program" -test.list '^Fuzz' | sed "s|^|$dir |"
  done >"$FUZZ_OUT.list"
  # An input that fails is left in the package's testdata, where each go test tries it.
  xargs -n 2 -P 2 bash -c '
    cd "$0" && out=$("$FUZZ_OUT/$0/test" -test.run "^$" -test.fuzz "^$1\$" -test.fuzztime "$FUZZ" -test.parallel 1 -test.fuzzcachedir "$FUZZ_CACHE/$0" 2>&1)
    rc=$?
    [ $rc = 0 ] || printf "%s\n" "$out"
    printf "%-4s %s %s\n" "$([ $rc = 0 ] && echo ok || echo FAIL)" "$0" "$1"
    exit $rc' <"$FUZZ_OUT.list"
}

# Built here and not by the tests: go test would hold back the progress.
guests() {
  tools
  say "artefacts of the guests"
  out/lab build --kind uml,qemu
}

lab() {
  guests
  say "the lab's own tests, with guests of both kinds"
  go test -p 1 -tags lab -count 1 -timeout 40m ./test/lab ./test/lab/guest ./test/lab/cmd/labrun
}

guest() {
  tools
  local kind=$1 pkgs measured=./operator/node skip='^$'
  pkgs=$(with 'TestLab' | grep -vx "$measured")
  # The emulated NIC's own tests need the emulated NIC.
  [ "$kind" = uml ] || pkgs=$(grep -vx ./test/nic <<<"$pkgs")
  # What takes many rounds, minutes without acceleration, is UML's alone.
  [ "$kind" = uml ] || skip='TestLabAllVFsAtOnce|TestLabUpdatesHaveNoGap'
  SLUICE_OVS=$(out/lab ovs)
  export SLUICE_OVS
  say "tests inside bare guests: $kind"
  # A guest of User-Mode Linux is one CPU: two are no bother to each other here. Alone
  # go those that hold the agent to times.
  go test -p "$([ "$kind" = uml ] && echo 2 || echo 1)" -tags lab -timeout 20m -run Lab -skip "$skip" -exec "$PWD/out/labrun -kind $kind" $pkgs
  go test -p 1 -tags lab -timeout 20m -run Lab -exec "$PWD/out/labrun -kind $kind" "$measured"
}

image() {
  say "image"
  export SLUICE_IMAGE=$PWD/out/sluice.tar
  go run ./hack/image -o "$SLUICE_IMAGE"
}

# e2e KIND [FLAG OF go test]...
e2e() {
  tools
  [ -n "${SLUICE_IMAGE:-}" ] || image
  say "tests on a cluster of guests: $1"
  LAB=$1 go test -tags e2e -count 1 -timeout 30m -v "${@:2}" ./test/e2e/
}

# Every second test on a cluster, from the first (1) or from the second (0) on.
half() { sed -n 's/^func \(Test[A-Z][a-z]\w*\)(t .*/^\1$/p' test/e2e/*_test.go | awk "NR % 2 == $1" | paste -sd '|'; }

bench() {
  tools
  KUBEBUILDER_ASSETS=$(out/lab assets)
  export KUBEBUILDER_ASSETS
  local result=out/bench.txt failed=0
  # One package, and one guest, at a time: two would measure each other.
  say "benchmarks on this machine"
  go test -p 1 -run '^$' -bench . -benchmem -timeout 30m $(with Benchmark) | tee "$result" || failed=1
  say "benchmarks inside bare guests"
  go test -p 1 -tags lab -run '^$' -bench Lab -benchtime 7x -timeout 30m -exec "$PWD/out/labrun -totalvfs 64" $(with BenchmarkLab) | tee -a "$result" || failed=1
  say "what was measured, ratios to a floor measured in the same run"
  awk '/^Benchmark/ { printf "%-44s", substr($1, 10); for (i = 3; i < NF; i += 2) if ($(i + 1) !~ /^(B|allocs)\/op$/) printf " %10s %s", $i, $(i + 1); print "" }' "$result"
  return $failed
}

case ${1:-all} in
all)
  verify
  guests
  image
  # Most tests wait most of their time, for a kernel, a kubelet or an API server. So what
  # needs no cluster goes side by side, bare guests of QEMU beside all, and two clusters
  # share the tests that only clusters of UML guests run. QEMU's comes after them: a third
  # one takes more time from a slow machine than it saves. Each stage is a shell of its
  # own, which its first failure ends.
  name=${SLUICE_LAB_NAME:-sluice-lab}
  say "begun beside the next: bare guests of qemu; unit tests, fuzz targets"
  hack/test.sh guest qemu >out/qemu.log 2>&1 & qemu=$!
  { hack/test.sh unit && hack/test.sh fuzz; } >out/unit.log 2>&1 & unit=$!
  failed=0
  hack/test.sh lab && hack/test.sh guest uml || failed=1
  besides="unit qemu"
  if [ $failed = 0 ]; then
    say "begun beside the next: the other half of the tests on a cluster of guests: uml"
    SLUICE_LAB_NAME=$name-2 hack/test.sh e2e uml -run "$(half 1)" >out/uml.log 2>&1 & uml=$!
    besides="unit uml qemu"
    hack/test.sh e2e uml -run "$(half 0)" || failed=1
  fi
  for beside in $besides; do
    say "waiting for what runs beside: $beside"
    wait ${!beside} || failed=1
    cat out/$beside.log
  done
  [ $failed = 0 ]
  hack/test.sh e2e qemu
  ;;
verify | unit | fuzz | lab | bench) "$1" ;;
guest | e2e) "$1" "${2:-uml}" "${@:3}" ;;
*) echo "usage: $0 [verify|unit|fuzz|lab|guest|e2e|bench] [uml|qemu]" >&2; exit 2 ;;
esac
say "done"
