// SPDX-License-Identifier: GPL-2.0
#include "sluicenic.h"

static const struct {
	char name[ETH_GSTRING_LEN];
	size_t offset;
} stats[] = {
#define STAT(field) { #field, offsetof(struct snic_counters, field) }
	STAT(rx_packets), STAT(rx_bytes), STAT(tx_packets), STAT(tx_bytes),
	STAT(rx_multicast), STAT(rx_broadcast), STAT(rx_dropped), STAT(tx_dropped),
	STAT(tx_spoofed), STAT(tx_vlan_denied),
#undef STAT
};

static void get_drvinfo(struct net_device *dev, struct ethtool_drvinfo *info)
{
	bool pf = snic_netdev(dev)->port->vf < 0;

	strscpy(info->driver, pf ? SNIC_PF_DRIVER : SNIC_VF_DRIVER, sizeof(info->driver));
	strscpy(info->version, SNIC_VERSION, sizeof(info->version));
	strscpy(info->fw_version, SNIC_VERSION, sizeof(info->fw_version));
	strscpy(info->bus_info, dev_name(dev->dev.parent), sizeof(info->bus_info));
	info->n_stats = ARRAY_SIZE(stats);
}

static int get_link_ksettings(struct net_device *dev, struct ethtool_link_ksettings *k)
{
	bool up = netif_carrier_ok(dev);

	k->base.speed = up ? SNIC_SPEED : SPEED_UNKNOWN;
	k->base.duplex = up ? DUPLEX_FULL : DUPLEX_UNKNOWN;
	k->base.port = PORT_FIBRE;
	k->base.autoneg = AUTONEG_DISABLE;
	ethtool_link_ksettings_zero_link_mode(k, supported);
	ethtool_link_ksettings_add_link_mode(k, supported, 25000baseSR_Full);
	ethtool_link_ksettings_add_link_mode(k, supported, FIBRE);
	return 0;
}

static int get_sset_count(struct net_device *dev, int set)
{
	return set == ETH_SS_STATS ? ARRAY_SIZE(stats) : -EOPNOTSUPP;
}

static void get_strings(struct net_device *dev, u32 set, u8 *data)
{
	int i;

	if (set != ETH_SS_STATS)
		return;
	for (i = 0; i < ARRAY_SIZE(stats); i++)
		ethtool_puts(&data, stats[i].name);
}

static void get_stats(struct net_device *dev, struct ethtool_stats *req, u64 *data)
{
	void *cnt = &snic_netdev(dev)->port->cnt;
	int i;

	for (i = 0; i < ARRAY_SIZE(stats); i++)
		data[i] = atomic64_read((atomic64_t *)(cnt + stats[i].offset));
}

const struct ethtool_ops snic_ethtool_ops = {
	.get_drvinfo = get_drvinfo,
	.get_link = ethtool_op_get_link,
	.get_link_ksettings = get_link_ksettings,
	.get_sset_count = get_sset_count,
	.get_strings = get_strings,
	.get_ethtool_stats = get_stats,
};

/* Of the wire and of representors, which are no function of their own. */
const struct ethtool_ops snic_link_ethtool_ops = {
	.get_link = ethtool_op_get_link,
	.get_link_ksettings = get_link_ksettings,
};
