// SPDX-License-Identifier: GPL-2.0
/*
 * Representors: in switchdev mode each VF has a netdev of the host that stands
 * for the other end of its cable. What the VF sends is received on it, and what is
 * sent on it the VF receives. The VF has a link while its representor is up.
 */
#include "sluicenic.h"

static netdev_tx_t rep_xmit(struct sk_buff *skb, struct net_device *dev)
{
	dev_sw_netstats_tx_add(dev, 1, skb->len);
	snic_switch_from_rep(snic_netdev(dev)->port, skb);
	return NETDEV_TX_OK;
}

/* As on mlx5, this is not what the PF tells of the VF: that is as the host set it. */
static void set_link(struct net_device *dev, int state)
{
	struct snic_netdev *priv = snic_netdev(dev);

	priv->port->link_state = state;
	snic_link_update(priv->card);
}

static int rep_open(struct net_device *dev)
{
	netif_carrier_on(dev);
	set_link(dev, IFLA_VF_LINK_STATE_ENABLE);
	return 0;
}

static int rep_stop(struct net_device *dev)
{
	netif_carrier_off(dev);
	set_link(dev, IFLA_VF_LINK_STATE_DISABLE);
	return 0;
}

static const struct net_device_ops rep_ops = {
	.ndo_open = rep_open,
	.ndo_stop = rep_stop,
	.ndo_start_xmit = rep_xmit,
	.ndo_get_stats64 = dev_get_tstats64,
	.ndo_set_mac_address = eth_mac_addr,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_change_mtu = snic_change_mtu,
};

static int rep_add(struct snic_port *port)
{
	struct snic_pf *pf = port->pf;
	struct net_device *dev;
	char name[IFNAMSIZ];
	int err;

	/* devlink takes what an earlier port left here for a registered one. */
	memset(&port->dl_port, 0, sizeof(port->dl_port));
	/* First: the next call looks at it to tell that this is a port of a switch. */
	snic_switch_id(pf->card, &port->dl_port.attrs.switch_id);
	devlink_port_attrs_pci_vf_set(&port->dl_port, 0, 0, port->vf, false);
	err = devl_port_register(priv_to_devlink(pf), &port->dl_port, port->vf + 1);
	if (err)
		return err;
	snic_name_rep(name, pf->card, port->vf);
	dev = snic_netdev_alloc(name, pf->card, port, &rep_ops);
	if (!dev) {
		err = -ENOMEM;
		goto err_port;
	}
	/* It belongs where the PF is: who has the VF must not have this. */
	dev->netns_immutable = true;
	dev->ethtool_ops = &snic_link_ethtool_ops;
	eth_hw_addr_random(dev);
	SET_NETDEV_DEV(dev, &pf->pdev->dev);
	SET_NETDEV_DEVLINK_PORT(dev, &port->dl_port);
	rtnl_lock();
	err = snic_netdev_register(dev);
	if (!err) {
		rcu_assign_pointer(port->rep, dev);
		port->link_state = port->link_set = IFLA_VF_LINK_STATE_DISABLE;
	}
	rtnl_unlock();
	if (!err)
		return 0;
	free_netdev(dev);
err_port:
	devl_port_unregister(&port->dl_port);
	return err;
}

static void rep_remove(struct snic_port *port)
{
	struct net_device *dev;

	rtnl_lock();
	dev = rtnl_dereference(port->rep);
	RCU_INIT_POINTER(port->rep, NULL);
	if (dev)
		unregister_netdevice(dev);	/* waits for readers of port->rep */
	port->link_state = port->link_set = IFLA_VF_LINK_STATE_AUTO;
	rtnl_unlock();
	if (!dev)
		return;
	free_netdev(dev);
	devl_port_unregister(&port->dl_port);
}

void snic_reps_remove(struct snic_pf *pf)
{
	int i;

	for (i = 0; i < pf->num_vfs; i++)
		rep_remove(&pf->vfs[i]);
}

int snic_reps_add(struct snic_pf *pf)
{
	int i, err;

	for (i = 0; i < pf->num_vfs; i++) {
		err = rep_add(&pf->vfs[i]);
		if (err) {
			snic_reps_remove(pf);
			return err;
		}
	}
	return 0;
}
