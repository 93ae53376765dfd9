package nft

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The wire format of nf_tables, include/uapi/linux/netfilter/nf_tables.h. Numbers are
// big-endian, lengths and types of attributes are not.

// Attributes and values that golang.org/x/sys/unix does not name.
const (
	objectCounter = 1     // NFT_OBJECT_COUNTER
	verdictType   = 1     // nft's own number of the type
	elementsBytes = 32768 // of one message: an attribute's length has 16 bits
)

// A buffer holds netlink messages.
type buffer []byte

func (b *buffer) uint32(kind uint16, v uint32) { b.bytes(kind, binary.BigEndian.AppendUint32(nil, v)) }
func (b *buffer) string(kind uint16, v string) { b.bytes(kind, append([]byte(v), 0)) }

func (b *buffer) bytes(kind uint16, v []byte) {
	*b = binary.NativeEndian.AppendUint16(*b, uint16(unix.SizeofNlAttr+len(v)))
	*b = binary.NativeEndian.AppendUint16(*b, kind)
	*b = append(*b, v...)
	b.pad()
}

func (b *buffer) pad() {
	for len(*b)%unix.NLA_ALIGNTO != 0 {
		*b = append(*b, 0)
	}
}

func (b *buffer) nest(kind uint16, f func()) {
	start := len(*b)
	*b = binary.NativeEndian.AppendUint16(*b, 0)
	*b = binary.NativeEndian.AppendUint16(*b, kind|unix.NLA_F_NESTED)
	f()
	binary.NativeEndian.PutUint16((*b)[start:], uint16(len(*b)-start))
}

// message writes one message; its sequence number is its place in the transaction.
func (b *buffer) message(kind, flags uint16, sequence uint32, family uint8, resource uint16, f func()) {
	start := len(*b)
	*b = append(*b, make([]byte, unix.NLMSG_HDRLEN)...)
	*b = append(*b, family, 0)
	*b = binary.BigEndian.AppendUint16(*b, resource)
	if f != nil {
		f()
	}
	h := (*b)[start:]
	binary.NativeEndian.PutUint32(h, uint32(len(h)))
	binary.NativeEndian.PutUint16(h[4:], kind)
	binary.NativeEndian.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(h[8:], sequence)
}

// transaction writes the operations as one batch, which the kernel does wholly or not
// at all, and returns the operation of each message and the number of the last.
func transaction(ops []op) (b buffer, of map[uint32]op, last uint32) {
	of = map[uint32]op{}
	b.message(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, 0, unix.NFNL_SUBSYS_NFTABLES, nil)
	start := 0
	for _, o := range ops {
		flags := uint16(0)
		switch o.do {
		case addTable, addChain, addSet, addElements, addCounter:
			flags = unix.NLM_F_CREATE
		case addRule:
			flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND
		}
		rest := o.elements
		for first := true; first || len(rest) > 0; first = false {
			last++
			of[last] = o
			start = len(b)
			b.message(o.kind(), flags, last, o.table.family, 0, func() { rest = b.op(o, rest) })
		}
	}
	// An answer to the last one says that all were read. Those that fail are answered anyway.
	flags := binary.NativeEndian.Uint16(b[start+6:])
	binary.NativeEndian.PutUint16(b[start+6:], flags|unix.NLM_F_ACK)
	b.message(unix.NFNL_MSG_BATCH_END, 0, last+1, 0, unix.NFNL_SUBSYS_NFTABLES, nil)
	return b, of, last
}

func (o op) kind() uint16 {
	return unix.NFNL_SUBSYS_NFTABLES<<8 | [...]uint16{
		addTable: unix.NFT_MSG_NEWTABLE, deleteTable: unix.NFT_MSG_DELTABLE,
		addChain: unix.NFT_MSG_NEWCHAIN, deleteChain: unix.NFT_MSG_DELCHAIN,
		flushChain: unix.NFT_MSG_DELRULE, addRule: unix.NFT_MSG_NEWRULE,
		addSet: unix.NFT_MSG_NEWSET, deleteSet: unix.NFT_MSG_DELSET,
		addElements: unix.NFT_MSG_NEWSETELEM, deleteElements: unix.NFT_MSG_DELSETELEM,
		addCounter: unix.NFT_MSG_NEWOBJ, deleteCounter: unix.NFT_MSG_DELOBJ,
	}[o.do]
}

func (o op) String() string {
	what := [...]string{"add table", "delete table", "add chain", "delete chain", "flush chain", "add rule to chain", "add set", "delete set", "add elements to set", "delete elements of set", "add counter", "delete counter"}[o.do]
	name := o.counter
	switch {
	case o.chain != nil:
		name = o.chain.name
	case o.set != nil:
		name = o.set.name
	}
	if name == "" {
		return what + " " + o.table.name
	}
	return what + " " + name + " in table " + o.table.name
}

// op writes one operation and returns the elements that did not fit into the message.
func (b *buffer) op(o op, elements []element) []element {
	b.string(1, o.table.name) // the table, in all messages
	switch o.do {
	case addTable:
		b.uint32(unix.NFTA_TABLE_FLAGS, 0) // somebody may have made it dormant
	case addChain, deleteChain:
		b.string(unix.NFTA_CHAIN_NAME, o.chain.name)
		if h := o.chain.hook; h != nil && o.do == addChain {
			b.nest(unix.NFTA_CHAIN_HOOK, func() {
				b.uint32(unix.NFTA_HOOK_HOOKNUM, h.number)
				b.uint32(unix.NFTA_HOOK_PRIORITY, h.priority)
				if h.device != "" {
					b.string(unix.NFTA_HOOK_DEV, h.device)
				}
			})
			b.uint32(unix.NFTA_CHAIN_POLICY, 1) // accept
			b.string(unix.NFTA_CHAIN_TYPE, "filter")
		}
	case flushChain:
		b.string(unix.NFTA_RULE_CHAIN, o.chain.name)
	case addRule:
		b.string(unix.NFTA_RULE_CHAIN, o.chain.name)
		b.nest(unix.NFTA_RULE_EXPRESSIONS, func() {
			for _, e := range o.rule {
				b.expr(e)
			}
		})
	case addSet:
		b.string(unix.NFTA_SET_NAME, o.set.name)
		flags := uint32(0)
		if o.set.interval {
			flags |= unix.NFT_SET_INTERVAL
		}
		if o.set.verdicts {
			flags |= unix.NFT_SET_MAP
		}
		b.uint32(unix.NFTA_SET_FLAGS, flags)
		b.uint32(unix.NFTA_SET_KEY_TYPE, o.set.key.number)
		b.uint32(unix.NFTA_SET_KEY_LEN, o.set.key.len)
		b.uint32(unix.NFTA_SET_ID, 1) // must be there; sets are told by name
		if o.set.verdicts {
			b.uint32(unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
			b.uint32(unix.NFTA_SET_DATA_LEN, 0)
		}
		// What nft needs to print the keys: their byte order, NFTNL_UDATA_SET_KEYBYTEORDER.
		b.bytes(unix.NFTA_SET_USERDATA, append([]byte{0, 4}, binary.NativeEndian.AppendUint32(nil, 2)...))
	case deleteSet:
		b.string(unix.NFTA_SET_NAME, o.set.name)
	case addElements, deleteElements:
		b.string(unix.NFTA_SET_ELEM_LIST_SET, o.set.name)
		b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
			for start := len(*b); len(elements) > 0 && len(*b)-start < elementsBytes; elements = elements[1:] {
				b.element(elements[0], o.set.interval)
			}
		})
	case addCounter, deleteCounter:
		b.string(unix.NFTA_OBJ_NAME, o.counter)
		b.uint32(unix.NFTA_OBJ_TYPE, objectCounter)
		if o.do == addCounter {
			b.nest(unix.NFTA_OBJ_DATA, func() {})
		}
	}
	return elements
}

func (b *buffer) value(kind uint16, v string) {
	b.nest(kind, func() { b.bytes(unix.NFTA_DATA_VALUE, []byte(v)) })
}

func (b *buffer) verdict(kind uint16, v verdict) {
	b.nest(kind, func() {
		b.nest(unix.NFTA_DATA_VERDICT, func() {
			b.uint32(unix.NFTA_VERDICT_CODE, uint32(v.code))
			if v.chain != "" {
				b.string(unix.NFTA_VERDICT_CHAIN, v.chain)
			}
		})
	})
}

// element writes an element; one of an interval set is two, of which the second says
// where the interval has ended.
func (b *buffer) element(e element, interval bool) {
	b.nest(unix.NFTA_LIST_ELEM, func() {
		b.value(unix.NFTA_SET_ELEM_KEY, e.key)
		if e.verdict != nil {
			b.verdict(unix.NFTA_SET_ELEM_DATA, *e.verdict)
		}
		if e.comment != "" { // NFTNL_UDATA_SET_ELEM_COMMENT
			b.bytes(unix.NFTA_SET_ELEM_USERDATA, append(append([]byte{0, byte(len(e.comment) + 1)}, e.comment...), 0))
		}
	})
	if end, ok := after(e.last); interval && ok {
		b.nest(unix.NFTA_LIST_ELEM, func() {
			b.value(unix.NFTA_SET_ELEM_KEY, end)
			b.uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
		})
	}
}

// after is the key that follows, if there is one.
func after(key string) (string, bool) {
	next := []byte(key)
	for i := len(next) - 1; i >= 0; i-- {
		next[i]++
		if next[i] != 0 {
			return string(next), true
		}
	}
	return "", false
}

func (b *buffer) named(name string, f func()) {
	b.nest(unix.NFTA_LIST_ELEM, func() {
		b.string(unix.NFTA_EXPR_NAME, name)
		b.nest(unix.NFTA_EXPR_DATA, f)
	})
}

// load reads into register 1.
func (b *buffer) load(l load) {
	switch l.from {
	case meta:
		b.named("meta", func() { b.uint32(unix.NFTA_META_KEY, l.at); b.uint32(unix.NFTA_META_DREG, unix.NFT_REG_1) })
	case ct:
		b.named("ct", func() { b.uint32(unix.NFTA_CT_KEY, l.at); b.uint32(unix.NFTA_CT_DREG, unix.NFT_REG_1) })
	case fragment:
		b.named("exthdr", func() {
			b.uint32(unix.NFTA_EXTHDR_DREG, unix.NFT_REG_1)
			b.bytes(unix.NFTA_EXTHDR_TYPE, []byte{unix.IPPROTO_FRAGMENT})
			b.uint32(unix.NFTA_EXTHDR_OFFSET, l.at)
			b.uint32(unix.NFTA_EXTHDR_LEN, l.len)
		})
	default:
		b.named("payload", func() {
			b.uint32(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1)
			b.uint32(unix.NFTA_PAYLOAD_BASE, uint32(l.from))
			b.uint32(unix.NFTA_PAYLOAD_OFFSET, l.at)
			b.uint32(unix.NFTA_PAYLOAD_LEN, l.len)
		})
	}
}

func (b *buffer) expr(e expr) {
	switch e := e.(type) {
	case match:
		b.load(e.load)
		if e.mask != "" {
			b.named("bitwise", func() {
				b.uint32(unix.NFTA_BITWISE_SREG, unix.NFT_REG_1)
				b.uint32(unix.NFTA_BITWISE_DREG, unix.NFT_REG_1)
				b.uint32(unix.NFTA_BITWISE_LEN, e.len)
				b.value(unix.NFTA_BITWISE_MASK, e.mask)
				b.value(unix.NFTA_BITWISE_XOR, string(make([]byte, e.len)))
			})
		}
		b.named("cmp", func() {
			b.uint32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
			b.uint32(unix.NFTA_CMP_OP, uint32(e.op))
			b.value(unix.NFTA_CMP_DATA, e.value)
		})
	case lookup:
		b.load(e.load)
		b.named("lookup", func() {
			b.string(unix.NFTA_LOOKUP_SET, e.set)
			b.uint32(unix.NFTA_LOOKUP_SREG, unix.NFT_REG_1)
			if e.not {
				b.uint32(unix.NFTA_LOOKUP_FLAGS, 1) // NFT_LOOKUP_F_INV
			}
		})
	case dispatch:
		b.load(e.load)
		b.named("lookup", func() {
			b.string(unix.NFTA_LOOKUP_SET, e.set)
			b.uint32(unix.NFTA_LOOKUP_SREG, unix.NFT_REG_1)
			b.uint32(unix.NFTA_LOOKUP_DREG, unix.NFT_REG_VERDICT)
		})
	case count:
		b.named("objref", func() {
			b.uint32(unix.NFTA_OBJREF_IMM_TYPE, objectCounter)
			b.string(unix.NFTA_OBJREF_IMM_NAME, e.counter)
		})
	case verdict:
		b.named("immediate", func() {
			b.uint32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
			b.verdict(unix.NFTA_IMMEDIATE_DATA, e)
		})
	default:
		panic(fmt.Sprintf("expression %T", e))
	}
}
