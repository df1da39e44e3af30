# Everyday commands. Works with GNU make 3.81 (macOS) and later; needs Go, nothing else. Run as root on Debian, `make test`
# also installs the interpreters that the examples in other languages are written for.

GO         ?= go
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME   ?= 10s
BENCHTIME  ?= 1s
PKG        ?= ./...
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Version control stamping is off because it fails in a checkout that belongs to somebody else; the stamp is ours.
BUILDFLAGS  = -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: all build test deps race race-soak lint bench test-sandbox bench-cold bench-traces bench-proxy bench-limiter bench-scale bench-gate bench-havip bench-tunnel test-networks test-vm fuzz fuzz-short demo kubectl clean

all: build

# build: bin/thaw and bin/queueproxy, static.
build:
	CGO_ENABLED=0 $(GO) build $(BUILDFLAGS) -o bin/ ./cmd/thaw ./cmd/queueproxy

# test: THE test command: vet and the whole suite.
test: deps
	$(GO) vet $(PKG)
	$(GO) test -timeout 15m $(PKG)

# deps: installs what tests can use when it may (root on Debian); never fails, tests skip with a reason what is not there.
deps:
	@scripts/testdeps

# What race leaves out. The first tests processes by their sockets: the race detector in the test, which the processes under test do not have, would
# find nothing in them; race-soak is for those. The others are computations in one goroutine, which take twenty times as long with it.
NO_RACE = /(test/(cluster|conformance|e2e|ingress|knative|kubectl|networks|readme|soak)|autoscaler/(replay|sim))$$

# race: the suite under the race detector (needs a C compiler). Vet is left to the other targets.
race:
	CGO_ENABLED=1 $(GO) test -race -vet=off -timeout 20m $$($(GO) list $(PKG) | grep -Ev '$(NO_RACE)')

# race-soak: the whole system under load, with rollouts, streams of every protocol and restarts of the router, of processes that have the
# race detector and end at its first finding.
race-soak:
	THAW_TEST_RACE=1 GORACE=halt_on_error=1 $(GO) test -count=1 -timeout 10m ./test/soak

# lint: formatting, vet, staticcheck (staticcheck.conf), and that the darwin build still holds.
lint:
	@scripts/gofmtcheck
	$(GO) vet $(PKG)
	$(GO) run $(STATICCHECK) $(PKG)
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null $(PKG)

bench:
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(PKG)

# test-sandbox: 1,000 starts and stops of sandboxes leave nothing, 100 survive their agent, bombs leave a neighbour its processor (root,
# about a minute, on a machine with nothing else to do).
test-sandbox:
	THAW_STARTS=1000 $(GO) test -count=1 -v -run NothingIsLeft ./test/isolation
	THAW_ADOPT=100 $(GO) test -count=1 -v -run Sandboxes ./instance
	THAW_NEIGHBOUR=1 $(GO) test -count=1 -v -run Neighbour ./test/isolation

# bench-cold: starts of each provider and language beside the kernel's own floor (root for sandboxes), bursts, memory, then starts through
# thaw dev with their waterfall, from the pools and frozen. docs/cold-start.md says how to read them; 3 minutes.
bench-cold:
	$(GO) run ./bench/coldstart
	THAW_PROVIDER=process $(GO) test -run '^$$' -bench ColdStart -benchtime 30x ./bench
	THAW_PROVIDER=auto $(GO) test -run '^$$' -bench ColdStart -benchtime 30x ./bench

# bench-traces: the planner against Knative's rules on real traces, cross-validated (some minutes): TRACES=DIR make bench-traces
bench-traces:
	$(GO) test -count=1 -timeout 60m -v -run 'TestTraces|TestWorldCup|TestCrossValidation|TestStartTimes' ./autoscaler/sim

# bench-proxy: CPU per request and memory of our hops beside nginx, haproxy (if installed) and net/http, in alternation; 10 minutes.
bench-proxy:
	$(GO) run ./bench/proxy

# bench-gate: fails when a hop's CPU per request, relative to nginx's, is far beyond what it is (docs/performance.md); 30 seconds. What lies beyond the gate
# is measured once more, three times as long, before it counts: a noisy machine gets over that, a regression does not.
GATE = $(GO) run ./bench/proxy -rows small -time 1s -only nginx,router,queue-proxy,merged,'router>queue-proxy' \
		-gate 'router=1.7,queue-proxy=1.7,merged=1.8,router>queue-proxy=3.7'
bench-gate:
	$(GATE) -rounds 3 || $(GATE) -rounds 9

# bench-limiter: limit, fairness and rate of the queue-proxy beside haproxy (if installed), and 10,000 held requests; 40 seconds.
bench-limiter:
	$(GO) run ./bench/limiter

# bench-scale: a million functions, a million instances, with a runtime that does nothing; a figure that is missed fails (2 minutes).
bench-scale:
	$(GO) test -run '^$$' -bench Decisions -benchmem -cpu 1 ./bench/scale
	$(GO) test -run '^$$' -bench 'Million|Instances|FirstRequests' -benchtime 1x -timeout 10m ./bench/scale

# bench-havip: every way for a router to fail, many times, then BUSYTIME of busy loops, then keepalived with conntrackd if installed (root;
# 2 minutes and BUSYTIME). A figure of docs/netproxy.md that is missed fails.
BUSYTIME ?= 10m
bench-havip:
	THAW_BENCH_HAVIP=$(BUSYTIME) $(GO) test -count=1 -timeout 30m -run 'TestBench' -v ./netproxy/havip

# bench-tunnel: what attaching an instance and a packet through a tunnel cost, beside the same nodes without one (root; a minute). A figure of
# docs/netproxy.md that is missed fails.
bench-tunnel:
	THAW_BENCH_TUNNEL=1 $(GO) test -count=1 -run 'TestBench' -v ./netproxy/tunnel ./netproxy/worker

# test-networks: the tests of tenants' networks through thaw dev, with 60 s of load in which no ENI may be touched, and with pairs that come and
# go with the load (root, 5 to 10 minutes).
test-networks:
	THAW_NETWORKS=60s $(GO) test -count=1 -timeout 30m -v ./test/networks

# test-vm: tunnels and slots under a stock Debian kernel in an emulated machine, which has the kernel's own GRE and IPIP devices (Debian on
# amd64; as root it installs qemu). 2 to 4 minutes.
test-vm:
	GO=$(GO) scripts/testvm

# kubectl: the real one, built from its module, for test/kubectl (some minutes the first time).
kubectl:
	cd test/kubectl/tool && CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w' -o ../../../bin/kubectl .

# fuzz: every Fuzz target that there is, one after another, FUZZTIME each.
fuzz:
	GO=$(GO) scripts/fuzz $(FUZZTIME)

.PHONY: soak bodies

# soak: ten minutes of load with scaling, rollouts and restarts of the router; prints a table of what the processes held.
SOAKTIME ?= 10m
soak:
	$(GO) test ./test/soak -count 1 -v -timeout 60m -args -duration $(SOAKTIME)

# bodies: 256 MiB up, down and both ways at once through router and queue-proxy, and what memory that takes.
bodies:
	$(GO) test ./test/conformance -count 1 -v -run 'TestLargeBodies|TestGoodAmongBad' -args -body 256

fuzz-short:
	GO=$(GO) scripts/fuzz 2s

.PHONY: images up down cluster-demo load faults

# faults: what happens when parts of a cluster die, with real processes on loopback (2 minutes).
faults:
	THAW_FAULTS=1 $(GO) test -count=1 -v -timeout 15m ./test/cluster

# images: the one image of the cluster, FROM scratch around a static binary; nothing is pulled.
images: build
	@rm -rf bin/image && mkdir -p bin/image && cp bin/thaw Dockerfile bin/image/
	docker build -q -t thaw:local bin/image

COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

# up: builds and starts the cluster of docker-compose.yml, waits until it serves, and deploys the sample.
up: images
	COMPOSE="$(COMPOSE)" scripts/cluster up

# down: removes it with all its data.
down:
	COMPOSE="$(COMPOSE)" scripts/cluster down

# cluster-demo: a cold start, a burst over the nodes, and the end of one part after another, on the cluster that is up.
cluster-demo:
	COMPOSE="$(COMPOSE)" scripts/cluster demo

# load: vegeta against the sample of the cluster that is up: RATE a second for DURATION.
RATE     ?= 200
DURATION ?= 10s
load:
	RATE=$(RATE) DURATION=$(DURATION) scripts/cluster load

demo:
	$(GO) run ./cmd/thaw demo

.PHONY: demo-net

# demo-net: two tenants with the same addresses, and a failover while their connections talk, in network namespaces (root, 10 seconds).
demo-net:
	$(GO) run ./cmd/thaw demo net

clean:
	rm -rf bin
	rm -f *.test *.prof
