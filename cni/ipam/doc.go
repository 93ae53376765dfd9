// Package ipam gives interfaces addresses out of IPPools, inside the agent.
//
// A pool is cut into blocks. A node has a block to itself by an IPBlock, whose name
// says which part of the pool it is: the API server lets only one be made. Blocks are
// claimed ahead and given back when idle, so that an ADD usually asks nobody.
//
// The ledger knows what each address of the node's blocks is: free, ready, taken or
// resting. Its image is in the node's journal. Only what the journal on disk calls
// "maybe in use" is ever handed out, and many addresses are marked so with one write
// ahead of need: an ADD waits for no disk. Whose an address is the journal of
// attachments says; what is marked and nobody's when an agent starts rests first.
//
// An address rests by the clock that counts since boot, in the same boot, and from
// the beginning after another boot: no change of the wall clock can shorten it.
//
// Reserved addresses and quotas are claimed in the same way. A reserved address lies in
// the block of some node: that one has to say first that it does not give it out.
// Whoever claims first writes and then reads what the other may have written, so that
// of two that overlap at least one sees the other and yields.
package ipam
