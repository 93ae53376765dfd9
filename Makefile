# Everything here runs on a fresh Debian machine with Go, make and root: what a
# target needs it builds or installs itself. Built artefacts (kernels, Kubernetes,
# images) are kept in ~/.cache/sluice and used again while their inputs are the same.

SHELL      := /bin/bash -o pipefail
GO         := go
export GOTOOLCHAIN := local
# One set of flags everywhere: with another the build cache would hold nothing, and
# Kubernetes is long to compile.
export GOFLAGS     := -buildvcs=false -trimpath
export CGO_ENABLED := 0

LAB  ?= uml
SOAK ?= 10m
SETS ?= 100000
OUT  := out
TOOL := $(GO) tool -modfile=hack/tools/go.mod
LABCLI := $(OUT)/lab
IMAGE  := $(OUT)/sluice.tar

.DEFAULT_GOAL := help
.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-zA-Z0-9_-]+:.*##/ {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: LAB=uml (default) or qemu, the kind of node guests.\n'

##@ Try it
.PHONY: demo demo-down
demo: $(LABCLI) image ## Start a cluster with SR-IOV nodes, install Sluice, run pods on VFs, show what happened
	$(GO) run ./test/demo -kind $(LAB) -image $(IMAGE)
demo-down: $(LABCLI) ## End the demo's cluster and remove all it made
	$(LABCLI) down

##@ Build
.PHONY: build image generate
build: ## Compile all programs into out/
	@mkdir -p $(OUT)
	$(GO) build -o $(OUT)/ ./operator/cmd/... ./cni/cmd/... ./test/lab/cmd/...
image: ## Build the container image as an archive, out/sluice.tar
	$(GO) run ./hack/image -o $(IMAGE)
generate: ## Write deepcopy code and CRDs from the types
	$(TOOL) controller-gen object paths=./apis/...
	$(TOOL) controller-gen crd paths=./apis/... output:crd:dir=config/crd/bases

##@ Check
.PHONY: test test-unit test-guest test-e2e lint verify bench soak
test: ## Everything: unit, API server, host kernel, guests of both kinds, clusters of both kinds
	hack/test.sh
test-unit: ## Unit tests, tests against a real API server and on this machine's kernel
	hack/test.sh unit
test-guest: ## Tests inside bare guests (LAB=uml or qemu)
	hack/test.sh guest $(LAB)
test-e2e: ## Tests on a cluster of guests (LAB=uml or qemu)
	hack/test.sh e2e $(LAB)
verify: ## Fail when generated files are not what generate writes
	hack/test.sh verify
lint: ## Run the linters
	$(TOOL) golangci-lint run ./...
	$(TOOL) golangci-lint run --build-tags lab,e2e ./internal/... ./operator/... ./cni/... ./test/...
bench: ## Benchmarks, as ratios against a floor measured in the same run
	hack/test.sh bench
soak: ## 200 MacVLAN sub-interfaces, then all VFs of a guest, attached and deleted at once, again and again (SOAK=10m each)
	SLUICE_SOAK=$(SOAK) CI=true $(GO) test -count 1 -timeout 60m -v -run 'TestNetnsSoak$$' ./cni/server
	@mkdir -p $(OUT)
	$(GO) build -o $(OUT)/ ./test/lab/cmd/labrun
	SLUICE_SOAK=$(SOAK) CI=true $(GO) test -count 1 -timeout 60m -v -tags lab -run 'TestLabAllVFsAtOnce$$' -exec "$(CURDIR)/$(OUT)/labrun -totalvfs 64" ./cni/server
.PHONY: policy-sets
policy-sets: ## Random clusters with random policies, judged a second time from the specification alone (SETS=100000)
	SLUICE_POLICY_SETS=$(SETS) $(GO) test -count 1 -timeout 3h -run 'TestVerdictsAre|TestEventsLead' ./cni/policy

##@ Lab: a real cluster on this machine, its nodes guests with SR-IOV NICs
.PHONY: lab-up lab-down lab-status lab-console lab-exec lab-kubectl lab-load
lab-up: $(LABCLI) ## Start the lab (LAB=uml or qemu)
	$(LABCLI) up --kind $(LAB)
lab-down: $(LABCLI) ## End the lab and remove what it made
	$(LABCLI) down
lab-status: $(LABCLI) ## What runs, since when, and where its logs are
	$(LABCLI) status
lab-console: $(LABCLI) ## Show the end of a node's console: NODE=vm1
	$(LABCLI) console $(NODE)
lab-exec: $(LABCLI) ## Run a command in a node: NODE=vm1 CMD='ip link'
	$(LABCLI) exec $(NODE) -- $(CMD)
lab-kubectl: $(LABCLI) ## kubectl in the lab: ARGS='get nodes'
	$(LABCLI) kubectl $(ARGS)
lab-load: $(LABCLI) image ## Load the image built from this tree into all nodes
	$(LABCLI) load $(IMAGE)

.PHONY: FORCE
$(LABCLI): FORCE
	@mkdir -p $(OUT)
	$(GO) build -o $@ ./test/lab/cmd/lab
