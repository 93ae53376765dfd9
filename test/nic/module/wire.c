// SPDX-License-Identifier: GPL-2.0
/*
 * The far end of the card's cable. What the card sends out is received on this
 * netdev and what is sent on it enters the card, so a bridge joins cards.
 * It belongs to the card, not to the PF driver: rebinding leaves the cable in.
 */
#include "sluicenic.h"

static netdev_tx_t wire_xmit(struct sk_buff *skb, struct net_device *dev)
{
	dev_sw_netstats_tx_add(dev, 1, skb->len);
	snic_switch_from_wire(snic_netdev(dev)->card, skb);
	return NETDEV_TX_OK;
}

static int wire_open(struct net_device *dev)
{
	snic_link_update(snic_netdev(dev)->card);
	return 0;
}

static int wire_stop(struct net_device *dev)
{
	snic_link_update(snic_netdev(dev)->card);
	return 0;
}

static const struct net_device_ops wire_ops = {
	.ndo_open = wire_open,
	.ndo_stop = wire_stop,
	.ndo_start_xmit = wire_xmit,
	.ndo_get_stats64 = dev_get_tstats64,
	.ndo_set_mac_address = eth_mac_addr,
	.ndo_validate_addr = eth_validate_addr,
};

int snic_wire_add(struct snic_card *card)
{
	char name[IFNAMSIZ];
	struct net_device *dev;
	int err;

	snic_name_wire(name, card);
	dev = snic_netdev_alloc(name, card, NULL, &wire_ops);
	if (!dev)
		return -ENOMEM;
	dev->ethtool_ops = &snic_link_ethtool_ops;
	/* A cable has no MTU: let it carry all that a card can send. */
	dev->mtu = SNIC_MAX_MTU;
	eth_hw_addr_random(dev);
	card->wire = dev;
	err = register_netdev(dev);
	if (err)
		free_netdev(dev);
	return err;
}

void snic_wire_remove(struct snic_card *card)
{
	unregister_netdev(card->wire);
	free_netdev(card->wire);
}
