// SPDX-License-Identifier: GPL-2.0
/*
 * What the host does to a VF through its PF. All under RTNL. Settings live in
 * the PF: they outlast the VF's driver and end when the VFs are removed.
 */
#include <linux/delay.h>
#include "sluicenic.h"

static struct snic_port *find_vf(struct net_device *dev, int vf)
{
	struct snic_pf *pf = snic_netdev(dev)->port->pf;

	return vf >= 0 && vf < pf->num_vfs ? &pf->vfs[vf] : ERR_PTR(-EINVAL);
}

/* Finds the VF for a change, which may be slow or fail as a test wants it. */
static struct snic_port *begin(struct net_device *dev, int vf, enum snic_fault_op op)
{
	struct snic_port *port = find_vf(dev, vf);
	struct snic_card *card = snic_netdev(dev)->card;
	u32 delay = READ_ONCE(card->vf_op_delay_ms);
	int err;

	if (IS_ERR(port))
		return port;
	if (delay)
		msleep(delay);
	err = snic_fault(card, op);
	return err ? ERR_PTR(err) : port;
}

int snic_set_vf_mac(struct net_device *dev, int vf, u8 *mac)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_MAC);
	struct net_device *fn;
	u64 addr;

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (is_multicast_ether_addr(mac))
		return -EINVAL;
	addr = ether_addr_to_u64(mac);
	port->admin_mac = addr;
	/*
	 * The switch follows at once, the VF's netdev at the next probe of its
	 * driver. All zeroes takes the admin address back.
	 */
	fn = rtnl_dereference(port->dev);
	if (!addr && fn)
		addr = ether_addr_to_u64(fn->dev_addr);
	WRITE_ONCE(port->mac, addr);
	return 0;
}

int snic_set_vf_vlan(struct net_device *dev, int vf, u16 vid, u8 qos, __be16 proto)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_VLAN);

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (proto != htons(ETH_P_8021Q) && proto != htons(ETH_P_8021AD))
		return -EPROTONOSUPPORT;
	if (vid >= VLAN_VID_MASK || qos > 7 || (!vid && qos))
		return -EINVAL;
	/* In switchdev mode the host's rules say this; as mlx5, no VLAN is none set. */
	if (snic_switchdev(port->pf))
		return vid ? -EOPNOTSUPP : 0;
	WRITE_ONCE(port->vst, snic_vst_pack(proto, vid, qos));
	return 0;
}

int snic_set_vf_rate(struct net_device *dev, int vf, int min, int max)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_RATE);

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (min < 0 || max < 0 || max > SNIC_SPEED || min > (max ?: SNIC_SPEED))
		return -EINVAL;
	port->min_rate = min;
	port->max_rate = max;
	return 0;
}

int snic_set_vf_spoofchk(struct net_device *dev, int vf, bool on)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_SPOOFCHK);

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (snic_switchdev(port->pf))
		return -EOPNOTSUPP;
	WRITE_ONCE(port->spoofchk, on);
	return 0;
}

int snic_set_vf_trust(struct net_device *dev, int vf, bool on)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_TRUST);

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (snic_switchdev(port->pf))
		return -EOPNOTSUPP;
	WRITE_ONCE(port->trusted, on);
	/* An address that only trust allowed ends with the trust. */
	if (!on && port->admin_mac)
		WRITE_ONCE(port->mac, port->admin_mac);
	return 0;
}

int snic_set_vf_link_state(struct net_device *dev, int vf, int state)
{
	struct snic_port *port = begin(dev, vf, SNIC_FAULT_VF_LINK_STATE);

	if (IS_ERR(port))
		return PTR_ERR(port);
	if (state < IFLA_VF_LINK_STATE_AUTO || state > IFLA_VF_LINK_STATE_DISABLE)
		return -EINVAL;
	port->link_state = port->link_set = state;
	snic_link_update(snic_netdev(dev)->card);
	return 0;
}

int snic_get_vf_config(struct net_device *dev, int vf, struct ifla_vf_info *info)
{
	struct snic_port *port = find_vf(dev, vf);

	if (IS_ERR(port))
		return PTR_ERR(port);
	info->vf = vf;
	u64_to_ether_addr(port->mac, info->mac);
	info->vlan = snic_vst_vid(port->vst);
	info->qos = (port->vst & VLAN_PRIO_MASK) >> VLAN_PRIO_SHIFT;
	info->vlan_proto = snic_vst_proto(port->vst);
	info->spoofchk = port->spoofchk;
	info->trusted = port->trusted;
	info->linkstate = port->link_set;
	info->min_tx_rate = port->min_rate;
	info->max_tx_rate = port->max_rate;
	return 0;
}

int snic_get_vf_stats(struct net_device *dev, int vf, struct ifla_vf_stats *stats)
{
	struct snic_port *port = find_vf(dev, vf);

	if (IS_ERR(port))
		return PTR_ERR(port);
	stats->rx_packets = atomic64_read(&port->cnt.rx_packets);
	stats->tx_packets = atomic64_read(&port->cnt.tx_packets);
	stats->rx_bytes = atomic64_read(&port->cnt.rx_bytes);
	stats->tx_bytes = atomic64_read(&port->cnt.tx_bytes);
	stats->broadcast = atomic64_read(&port->cnt.rx_broadcast);
	stats->multicast = atomic64_read(&port->cnt.rx_multicast);
	stats->rx_dropped = atomic64_read(&port->cnt.rx_dropped);
	stats->tx_dropped = atomic64_read(&port->cnt.tx_dropped);
	return 0;
}
