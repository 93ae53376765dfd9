// SPDX-License-Identifier: GPL-2.0
/*
 * The embedded switch. In legacy mode it forwards by itself, and learns nothing: it
 * knows the unicast address of each function, and everything else lives on the wire.
 * In switchdev mode it has no rules, so each VF is joined to its representor and the
 * wire to the PF's netdev, the uplink; what goes between them the host forwards.
 *
 * Inside the switch a frame has the form of a received one: data at the network
 * header, outermost VLAN tag in the skb's metadata.
 */
#include "sluicenic.h"

static bool tag_of(const struct sk_buff *skb, __be16 *proto, u16 *vid)
{
	if (!skb_vlan_tag_present(skb))
		return false;
	*proto = skb->vlan_proto;
	*vid = skb_vlan_tag_get_id(skb);
	/* A priority tag names no VLAN. */
	return *vid || *proto != htons(ETH_P_8021Q);
}

/* Brings a frame from ndo_start_xmit into the switch's form; NULL if it is bad. */
static struct sk_buff *normalise(struct sk_buff *skb, struct net_device *dev)
{
	if (unlikely(!pskb_may_pull(skb, ETH_HLEN))) {
		kfree_skb(skb);
		return NULL;
	}
	/* No mark, route, conntrack or time stamp goes over a cable. */
	skb_scrub_packet(skb, true);
	skb_reset_mac_header(skb);
	skb->protocol = eth_type_trans(skb, dev);
	if (!skb_vlan_tag_present(skb) && eth_type_vlan(skb->protocol))
		skb = skb_vlan_untag(skb);
	return skb;
}

/* Adds a tag outside of the one the frame has. */
static int push_outer_tag(struct sk_buff *skb, __be16 proto, u16 tci)
{
	int err;

	skb_push(skb, ETH_HLEN);
	err = skb_vlan_push(skb, proto, tci);
	if (!err)
		skb_pull(skb, ETH_HLEN);
	return err;
}

/* What the switch demands of a frame from a VF; false: drop it. */
static bool vf_ingress(struct snic_port *port, struct sk_buff *skb)
{
	u32 vst = snic_port_vst(port);

	/* Access control is of legacy mode. */
	if (snic_switchdev(port->pf))
		return true;
	if (READ_ONCE(port->spoofchk) &&
	    ether_addr_to_u64(eth_hdr(skb)->h_source) != READ_ONCE(port->mac)) {
		atomic64_inc(&port->cnt.tx_spoofed);
		return false;
	}
	if (!vst)
		return true;
	if (!skb_vlan_tag_present(skb)) {
		__vlan_hwaccel_put_tag(skb, snic_vst_proto(vst), snic_vst_tci(vst));
		return true;
	}
	/* Only a service tag may go around a tag of the VF's own. */
	if (snic_vst_proto(vst) != htons(ETH_P_8021AD) ||
	    skb->vlan_proto != htons(ETH_P_8021Q)) {
		atomic64_inc(&port->cnt.tx_vlan_denied);
		return false;
	}
	return !push_outer_tag(skb, snic_vst_proto(vst), snic_vst_tci(vst));
}

static bool is_promisc(const struct snic_port *port, const struct net_device *dev)
{
	return dev->flags & IFF_PROMISC &&
	       (port->vf < 0 || READ_ONCE(port->trusted));
}

/* Is the function in the frame's VLAN? */
static bool in_vlan(const struct snic_port *port, const struct net_device *dev,
		    const struct sk_buff *skb)
{
	u32 vst = snic_port_vst(port);
	__be16 proto;
	u16 vid;

	if (!tag_of(skb, &proto, &vid))
		return !vst;
	if (vst)
		return proto == snic_vst_proto(vst) && vid == snic_vst_vid(vst);
	return test_bit(vid, port->vlans[proto == htons(ETH_P_8021AD)]) ||
	       (port->vf < 0 && dev->flags & IFF_PROMISC);
}

static void to_port(struct snic_port *port, struct net_device *dev,
		    struct sk_buff *skb)
{
	const u8 *dst = eth_hdr(skb)->h_dest;
	bool mc = is_multicast_ether_addr(dst), bc = is_broadcast_ether_addr(dst);
	unsigned int len;

	if (snic_port_vst(port))
		__vlan_hwaccel_clear_tag(skb);
	skb_push(skb, ETH_HLEN);
	len = skb->len;
	/* Drops and frees what the function cannot take: down, or above its MTU. */
	if (dev_forward_skb(dev, skb) != NET_RX_SUCCESS) {
		atomic64_inc(&port->cnt.rx_dropped);
		return;
	}
	dev_sw_netstats_rx_add(dev, len);
	atomic64_inc(&port->cnt.rx_packets);
	atomic64_add(len, &port->cnt.rx_bytes);
	if (bc)
		atomic64_inc(&port->cnt.rx_broadcast);
	else if (mc)
		atomic64_inc(&port->cnt.rx_multicast);
}

/* Hands the frame to the wire or to a representor (NULL: there is none). */
static void to_netdev(struct net_device *dev, struct sk_buff *skb)
{
	unsigned int len;

	if (!dev || !netif_carrier_ok(dev)) {
		kfree_skb(skb);
		return;
	}
	skb_push(skb, ETH_HLEN);
	len = skb->len;
	if (dev_forward_skb(dev, skb) == NET_RX_SUCCESS)
		dev_sw_netstats_rx_add(dev, len);
}

/*
 * Gives the frame to every function that must have it and, when @src is not the
 * wire (NULL), to the wire if it is for many or for nobody here: legacy mode. RCU
 * read side.
 */
static void forward(struct snic_pf *pf, struct snic_port *src, struct sk_buff *skb)
{
	const u8 *dst = eth_hdr(skb)->h_dest;
	bool many = is_multicast_ether_addr(dst), local = false;
	u64 mac = ether_addr_to_u64(dst);
	struct net_device *last_dev = NULL;
	struct snic_port *last = NULL;
	int i, n = READ_ONCE(pf->num_vfs);

	/* One step behind, so that the last taker gets the frame itself. */
	for (i = -1; i < n; i++) {
		struct snic_port *port = i < 0 ? &pf->port : &pf->vfs[i];
		struct net_device *dev = rcu_dereference(port->dev);
		bool mine = mac == READ_ONCE(port->mac);

		if (port == src || !dev || !in_vlan(port, dev, skb))
			continue;
		if (!many && !mine && !is_promisc(port, dev))
			continue;
		/* The address of a function that is down is not on the wire either. */
		local |= mine;
		if (!netif_running(dev) || !netif_carrier_ok(dev))
			continue;
		if (last) {
			struct sk_buff *copy = skb_clone(skb, GFP_ATOMIC);

			if (copy)
				to_port(last, last_dev, copy);
		}
		last = port;
		last_dev = dev;
	}
	if (src && (many || !local)) {
		if (last) {
			struct sk_buff *copy = skb_clone(skb, GFP_ATOMIC);

			if (copy)
				to_port(last, last_dev, copy);
		}
		to_netdev(pf->card->wire, skb);
	} else if (last) {
		to_port(last, last_dev, skb);
	} else {
		kfree_skb(skb);
	}
}

void snic_switch_from_port(struct snic_port *port, struct sk_buff *skb)
{
	struct net_device *dev = skb->dev;
	unsigned int len = skb->len;

	rcu_read_lock();
	skb = normalise(skb, dev);
	if (!skb)
		goto drop;
	if (!netif_carrier_ok(dev) || (port->vf >= 0 && !vf_ingress(port, skb))) {
		kfree_skb(skb);
		goto drop;
	}
	atomic64_inc(&port->cnt.tx_packets);
	atomic64_add(len, &port->cnt.tx_bytes);
	if (!snic_switchdev(port->pf))
		forward(port->pf, port, skb);
	else if (port->vf < 0)
		to_netdev(port->pf->card->wire, skb);
	else
		to_netdev(rcu_dereference(port->rep), skb);
	rcu_read_unlock();
	return;
drop:
	atomic64_inc(&port->cnt.tx_dropped);
	dev_core_stats_tx_dropped_inc(dev);
	rcu_read_unlock();
}

/* The function itself filters what reaches it: addresses and VLANs. */
void snic_switch_from_rep(struct snic_port *port, struct sk_buff *skb)
{
	struct net_device *rep = skb->dev, *dev;
	const u8 *dst;

	rcu_read_lock();
	skb = normalise(skb, rep);
	if (!skb)
		goto drop;
	dev = rcu_dereference(port->dev);
	dst = eth_hdr(skb)->h_dest;
	if (!dev || !netif_carrier_ok(dev) || !in_vlan(port, dev, skb) ||
	    (!is_multicast_ether_addr(dst) && !is_promisc(port, dev) &&
	     ether_addr_to_u64(dst) != READ_ONCE(port->mac))) {
		kfree_skb(skb);
		goto drop;
	}
	to_port(port, dev, skb);
	rcu_read_unlock();
	return;
drop:
	dev_core_stats_tx_dropped_inc(rep);
	rcu_read_unlock();
}

void snic_switch_from_wire(struct snic_card *card, struct sk_buff *skb)
{
	struct snic_pf *pf;

	rcu_read_lock();
	pf = rcu_dereference(card->pf);
	if (pf && netif_carrier_ok(card->wire)) {
		skb = normalise(skb, card->wire);
		if (skb && snic_switchdev(pf))
			to_port(&pf->port, pf->dev, skb);	/* unfiltered: a bridge may want it */
		else if (skb)
			forward(pf, NULL, skb);
	} else {
		dev_core_stats_tx_dropped_inc(card->wire);
		kfree_skb(skb);
	}
	rcu_read_unlock();
}
