package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// IPPoolSpec is a supply of addresses for interfaces of pods, in the whole cluster.
//
// +kubebuilder:validation:XValidation:rule="has(self.ipv4) || has(self.ipv6)",message="it has no addresses: give ipv4, ipv6 or both"
// +kubebuilder:validation:XValidation:rule="has(self.ipv4) == has(oldSelf.ipv4) || !has(oldSelf.ipv4)",fieldPath=".ipv4",message="ipv4 cannot be taken out of a pool: make another pool"
// +kubebuilder:validation:XValidation:rule="has(self.ipv6) == has(oldSelf.ipv6) || !has(oldSelf.ipv6)",fieldPath=".ipv6",message="ipv6 cannot be taken out of a pool: make another pool"
type IPPoolSpec struct {
	// ipv4 are the IPv4 addresses. Each interface gets one.
	// +optional
	IPv4 *IPRange `json:"ipv4,omitempty"`
	// ipv6 are the IPv6 addresses. Each interface gets one.
	// +optional
	IPv6 *IPRange `json:"ipv6,omitempty"`
	// routes are set in the pod, beside that to the subnet itself.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Routes []IPPoolRoute `json:"routes,omitempty"`
	// dns is what the runtime is told of name servers.
	// +optional
	DNS *IPPoolDNS `json:"dns,omitempty"`
	// namespaces are those whose pods may have addresses of the pool. Empty lets all.
	// +optional
	// +kubebuilder:validation:MaxItems=1024
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	Namespaces []string `json:"namespaces,omitempty"`
	// reservations keep addresses for pods that are known by name or by MAC. They are of
	// the subnet, inside or outside of start and end, and have no rest: only their owner
	// gets them. So take a reservation away when its pod has been gone for the time of rest.
	// +optional
	// +kubebuilder:validation:MaxItems=4096
	// +listType=map
	// +listMapKey=address
	Reservations []IPReservation `json:"reservations,omitempty"`
	// quotas limit how many interfaces the pods of a namespace may have from the pool at a
	// time, in the whole cluster.
	// +optional
	// +kubebuilder:validation:MaxItems=1024
	// +listType=map
	// +listMapKey=namespace
	Quotas []IPQuota `json:"quotas,omitempty"`
	// restSeconds is how long an address rests after its interface is gone, before another
	// gets it: until neighbours have forgotten who had it.
	// +optional
	// +kubebuilder:default=60
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 86400",message="not a time of rest: set restSeconds to 0 to 86400"
	RestSeconds *int `json:"restSeconds,omitempty"`
}

// IPRange is the addresses of one family.
//
// +kubebuilder:validation:XValidation:rule="(has(self.blockSize) ? self.blockSize : 0) == (has(oldSelf.blockSize) ? oldSelf.blockSize : 0)",fieldPath=".blockSize",message="blockSize cannot change, for nodes hold blocks of this size: make another pool"
type IPRange struct {
	// cidr is the subnet that the interfaces are in, such as 10.1.0.0/20 or fd00:1::/64.
	// +required
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cidr cannot change, for nodes hold blocks of it: make another pool"
	// +kubebuilder:validation:XValidation:rule="isCIDR(self) && cidr(self) == cidr(self).masked()",messageExpression="'\"' + self + '\" is not a subnet: write, for example, 10.1.0.0/20 or fd00:1::/64'"
	CIDR string `json:"cidr"`
	// start is the first address that is given out; unset means the subnet's first.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",messageExpression="'\"' + self + '\" is not an IP address'"
	Start string `json:"start,omitempty"`
	// end is the last address that is given out; unset means the subnet's last.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",messageExpression="'\"' + self + '\" is not an IP address'"
	End string `json:"end,omitempty"`
	// gateway is the subnet's router, which no pod gets. Routes without a gateway of their
	// own go there.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",messageExpression="'\"' + self + '\" is not an IP address'"
	Gateway string `json:"gateway,omitempty"`
	// exclude are addresses and subnets that no pod gets.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=64
	// +kubebuilder:validation:items:XValidation:rule="isIP(self) || isCIDR(self)",messageExpression="'\"' + self + '\" is neither an address nor a subnet'"
	// +listType=set
	Exclude []string `json:"exclude,omitempty"`
	// blockSize is how many addresses a node claims at a time, a power of two up to 65536.
	// Unset means a 32nd of the subnet, but no more than 64 IPv4 or 65536 IPv6 addresses.
	// What a node has claimed others cannot use: take smaller blocks where many nodes share
	// few addresses.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]",message="not a power of two from 1 to 65536"
	BlockSize int `json:"blockSize,omitempty"`
}

// IPPoolRoute is a route in a pod.
type IPPoolRoute struct {
	// dst is where to, such as 10.0.0.0/8.
	// +required
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="isCIDR(self)",messageExpression="'\"' + self + '\" is not a subnet: write, for example, 10.0.0.0/8'"
	Dst string `json:"dst"`
	// gw is the router; unset means the subnet's gateway.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || isIP(self)",messageExpression="'\"' + self + '\" is not an IP address'"
	Gw string `json:"gw,omitempty"`
}

// IPPoolDNS is what a runtime is told of name servers.
type IPPoolDNS struct {
	// nameservers are addresses, the first to be asked first.
	// +optional
	// +kubebuilder:validation:MaxItems=8
	// +listType=atomic
	Nameservers []string `json:"nameservers,omitempty"`
	// domain is the local domain.
	// +optional
	Domain string `json:"domain,omitempty"`
	// search are domains for short names.
	// +optional
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Search []string `json:"search,omitempty"`
	// options are those of the resolver.
	// +optional
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Options []string `json:"options,omitempty"`
}

// IPReservation keeps an address for a pod. All that is given must be the pod's.
//
// +kubebuilder:validation:XValidation:rule="(has(self.pod) && size(self.pod) > 0) || (has(self.mac) && size(self.mac) > 0)",message="it is for nobody: give pod, mac or both"
type IPReservation struct {
	// address of the pool's subnet.
	// +required
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="isIP(self)",messageExpression="'\"' + self + '\" is not an IP address'"
	Address string `json:"address"`
	// namespace of the pod.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace"`
	// pod is its name.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Pod string `json:"pod,omitempty"`
	// mac is the address of the pod's interface, such as 02:00:00:00:00:01.
	// +optional
	// +kubebuilder:validation:MaxLength=17
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$')",messageExpression="'\"' + self + '\" is not a MAC address like 02:00:00:00:00:01'"
	MAC string `json:"mac,omitempty"`
}

// IPQuota limits a namespace.
type IPQuota struct {
	// namespace that is limited; * is each that has no quota of its own.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace"`
	// interfaces is how many its pods may have from the pool at a time.
	// +required
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 1000000",message="not a number of interfaces: set interfaces to 0 to 1000000"
	Interfaces int `json:"interfaces"`
}

// IPPoolStatus says how much of a pool is used. What nodes say of their blocks is up to
// two minutes old.
type IPPoolStatus struct {
	// conditions are Ready and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ipv4 and ipv6 count addresses.
	// +optional
	IPv4 *IPUsage `json:"ipv4,omitempty"`
	// +optional
	IPv6 *IPUsage `json:"ipv6,omitempty"`
	// claims is the number of blocks, reserved addresses and shares of quotas that nodes
	// hold. A pool that has any cannot be deleted.
	// +optional
	Claims int `json:"claims"`
	// nodes are those that hold blocks, the ones with the most first, and no more than 100.
	// +optional
	// +listType=map
	// +listMapKey=name
	Nodes []IPNodeUsage `json:"nodes,omitempty"`
	// quotas are the namespaces that hold shares of their quotas, no more than 100.
	// +optional
	// +listType=map
	// +listMapKey=namespace
	Quotas []IPQuotaUsage `json:"quotas,omitempty"`
}

// IPUsage counts the addresses of one family. Numbers beyond 2^63-1 are shown as that.
type IPUsage struct {
	// total is how many can be given out, reservations left out.
	Total int64 `json:"total"`
	// claimed is how many of them are in blocks that nodes hold.
	Claimed int64 `json:"claimed"`
	// allocated is how many interfaces have.
	Allocated int64 `json:"allocated"`
	// resting is how many were given back and wait.
	Resting int64 `json:"resting"`
	// reserved is the number of reservations.
	Reserved int64 `json:"reserved"`
}

// IPNodeUsage is what a node holds of a pool.
type IPNodeUsage struct {
	// name of the node.
	Name string `json:"name"`
	// blocks it holds.
	Blocks int `json:"blocks"`
	// allocated is how many addresses interfaces have.
	Allocated int64 `json:"allocated"`
}

// IPQuotaUsage is what nodes hold of a namespace's quota.
type IPQuotaUsage struct {
	// namespace that is limited.
	Namespace string `json:"namespace"`
	// interfaces is its limit.
	Interfaces int `json:"interfaces"`
	// claimed is how many of them nodes hold ready or in use.
	Claimed int `json:"claimed"`
}

// IPPool is a supply of addresses for interfaces of pods. A network uses it by
// "ipam": {"type": "sluice", "pool": "its name"}. It counts in the operator's namespace.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="IPv4",type=string,JSONPath=`.spec.ipv4.cidr`
// +kubebuilder:printcolumn:name="Used",type=integer,JSONPath=`.status.ipv4.allocated`
// +kubebuilder:printcolumn:name="Of",type=integer,JSONPath=`.status.ipv4.total`
// +kubebuilder:printcolumn:name="IPv6",type=string,JSONPath=`.spec.ipv6.cidr`
// +kubebuilder:printcolumn:name="Used6",type=integer,JSONPath=`.status.ipv6.allocated`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type IPPool struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec IPPoolSpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status IPPoolStatus `json:"status,omitzero"`
}

// IPPoolList is a list of pools.
//
// +kubebuilder:object:root=true
type IPPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []IPPool `json:"items"`
}

// IPBlockSpec is a part of a pool that one node has to itself.
//
// +kubebuilder:validation:XValidation:rule="self.pool == oldSelf.pool && self.node == oldSelf.node && self.kind == oldSelf.kind && self.size == oldSelf.size && self.first == oldSelf.first && self.__namespace__ == oldSelf.__namespace__ && self.index == oldSelf.index",message="a block stays what it is: delete it and make another"
type IPBlockSpec struct {
	// pool it is of.
	// +required
	// +kubebuilder:validation:MaxLength=63
	Pool string `json:"pool"`
	// node that has it.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// kind: Addresses to give out, one Reserved address, or Quota, a share of a
	// namespace's.
	// +required
	// +kubebuilder:validation:Enum=Addresses;Reserved;Quota
	Kind IPBlockKind `json:"kind"`
	// first address, IPv6 with all digits; empty for a share of a quota.
	// +required
	// +kubebuilder:validation:MaxLength=64
	First string `json:"first"`
	// size is the number of addresses, or of interfaces in a share.
	// +required
	// +kubebuilder:validation:XValidation:rule="self >= 1 && self <= 65536",message="not a size: 1 to 65536"
	Size int `json:"size"`
	// namespace of a share of a quota, else empty.
	// +required
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace"`
	// index of a share, from 0.
	// +required
	Index int `json:"index"`
	// excluded are addresses in the block that the node does not give out, so that they can
	// be claimed as reserved. It only grows.
	// +optional
	// +kubebuilder:validation:MaxItems=4096
	// +kubebuilder:validation:items:MaxLength=64
	// +listType=set
	Excluded []string `json:"excluded,omitempty"`
}

// IPBlockKind is what a block is of.
type IPBlockKind string

// The kinds of blocks.
const (
	BlockAddresses IPBlockKind = "Addresses"
	BlockReserved  IPBlockKind = "Reserved"
	BlockQuota     IPBlockKind = "Quota"
)

// IPBlockStatus is how much of a block is used, as its node says now and then.
type IPBlockStatus struct {
	// allocated is how many addresses interfaces have.
	// +optional
	Allocated int `json:"allocated,omitempty"`
	// resting is how many were given back and wait.
	// +optional
	Resting int `json:"resting,omitempty"`
}

// IPBlock is a part of an IPPool that one node has to itself: its name says which part,
// so that the API server lets only one node make it. Agents make and delete them.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:selectablefield:JSONPath=`.spec.pool`
// +kubebuilder:printcolumn:name="Pool",type=string,JSONPath=`.spec.pool`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Kind",type=string,JSONPath=`.spec.kind`
// +kubebuilder:printcolumn:name="First",type=string,JSONPath=`.spec.first`
// +kubebuilder:printcolumn:name="Size",type=integer,JSONPath=`.spec.size`
// +kubebuilder:printcolumn:name="Used",type=integer,JSONPath=`.status.allocated`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type IPBlock struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is which part, and whose.
	// +required
	Spec IPBlockSpec `json:"spec"`
	// status is how much of it is used.
	// +optional
	Status IPBlockStatus `json:"status,omitzero"`
}

// IPBlockList is a list of blocks.
//
// +kubebuilder:object:root=true
type IPBlockList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []IPBlock `json:"items"`
}
