package nft

// The rules as data: what render makes, encode writes for the kernel, and the tests
// evaluate.

// table is a table of nf_tables.
type table struct {
	family uint8 // NFPROTO_INET or NFPROTO_NETDEV
	name   string
}

// Where a load reads from: a payload base of the kernel (nft_payload_bases), or one of
// the others.
type source uint8

const (
	link      source = iota // link layer header
	network                 // network header
	transport               // transport header; a fragment that is not the first has none
	meta
	ct
	fragment // IPv6 fragment header
)

// load is what a rule looks at.
type load struct {
	from    source
	at, len uint32 // at is the offset in a header, or the key of meta and ct
}

// compare is an operator of nft_cmp_ops.
type compare uint32

const (
	equal compare = iota
	notEqual
	_
	atMost
	_
	atLeast
)

// An expr is one step of a rule: match, lookup, dispatch, count or verdict.
type expr interface{}

// match goes on if the load, masked when there is a mask, compares so.
type match struct {
	load
	mask  string
	op    compare
	value string
}

// lookup goes on if the load is, or is not, in the set.
type lookup struct {
	load
	set string
	not bool
}

// dispatch takes the verdict that the map has for the load, and goes on if there is none.
type dispatch struct {
	load
	set string
}

// count adds the packet to the counter object of the table.
type count struct{ counter string }

// verdict is the end of a rule. The codes are the kernel's.
type verdict struct {
	code  int32
	chain string
}

const (
	codeJump   = -3
	codeReturn = -5
)

var (
	drop   = verdict{code: 0}
	accept = verdict{code: 1}
	goBack = verdict{code: codeReturn}
)

func jump(chain string) verdict   { return verdict{codeJump, chain} }
func is(l load, v string) match   { return match{load: l, op: equal, value: v} }
func isnt(l load, v string) match { return match{load: l, op: notEqual, value: v} }

type rule []expr

// hook is where the kernel calls a base chain. Its policy is accept always: while a
// transaction waits, a new chain is called that has no rules yet.
type hook struct {
	number   uint32
	priority uint32
	device   string // of family netdev
}

type chain struct {
	table table
	name  string
	hook  *hook // nil for a chain that others jump to
	rules []rule
}

// set is a set, or a map to verdicts.
type set struct {
	table    table
	name     string
	key      keyType
	interval bool
	verdicts bool
}

// keyType is a type of nft's and its length.
type keyType struct{ number, len uint32 }

var (
	ipv4Addr  = keyType{7, 4}
	ipv6Addr  = keyType{8, 16}
	etherAddr = keyType{9, 6}
)

// element is a key of a set, or in an interval set the keys from key to last.
type element struct {
	key, last string
	verdict   *verdict
	comment   string
}

// op is one message of a transaction.
type op struct {
	do       action
	table    table
	chain    *chain
	rule     rule
	set      *set
	elements []element
	counter  string
}

type action uint8

const (
	addTable action = iota
	deleteTable
	addChain
	deleteChain
	flushChain
	addRule
	addSet
	deleteSet
	addElements
	deleteElements
	addCounter
	deleteCounter
)

func (c chain) addRules() []op {
	var ops []op
	for _, r := range c.rules {
		ops = append(ops, op{do: addRule, table: c.table, chain: &c, rule: r})
	}
	return ops
}

// replace are the operations that give the chain these rules and no others.
func (c chain) replace() []op {
	return append([]op{{do: addChain, table: c.table, chain: &c}, {do: flushChain, table: c.table, chain: &c}}, c.addRules()...)
}
