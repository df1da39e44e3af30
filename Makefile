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

.PHONY: all build test deps race lint bench bench-cold bench-proxy fuzz fuzz-short demo kubectl clean

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

# race: the whole suite under the race detector (needs a C compiler).
race:
	CGO_ENABLED=1 $(GO) test -race -timeout 20m $(PKG)

# lint: formatting, vet, staticcheck (staticcheck.conf), and that the darwin build still holds.
lint:
	@scripts/gofmtcheck
	$(GO) vet $(PKG)
	$(GO) run $(STATICCHECK) $(PKG)
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null $(PKG)

bench:
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(PKG)

# bench-cold: 200 cold starts with their waterfall.
bench-cold:
	$(GO) test -run '^$$' -bench ColdStart -benchtime 200x ./bench

# bench-proxy: CPU per request of our hops beside nginx, haproxy (if installed) and net/http, in alternation.
bench-proxy:
	$(GO) run ./bench/proxy

# kubectl: the real one, built from its module, for test/kubectl (some minutes the first time).
kubectl:
	cd test/kubectl/tool && CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w' -o ../../../bin/kubectl .

# fuzz: every Fuzz target that there is, one after another, FUZZTIME each.
fuzz:
	GO=$(GO) scripts/fuzz $(FUZZTIME)

fuzz-short:
	GO=$(GO) scripts/fuzz 2s

demo:
	$(GO) run ./cmd/thaw demo

clean:
	rm -rf bin
	rm -f *.test *.prof
