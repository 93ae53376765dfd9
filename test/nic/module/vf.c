// SPDX-License-Identifier: GPL-2.0
/* The VF driver. Where real ones ask the PF by mailbox, it looks at its port. */
#include "sluicenic.h"

static netdev_tx_t vf_xmit(struct sk_buff *skb, struct net_device *dev)
{
	dev_sw_netstats_tx_add(dev, 1, skb->len);
	snic_switch_from_port(snic_netdev(dev)->port, skb);
	return NETDEV_TX_OK;
}

static int vf_set_mac(struct net_device *dev, void *p)
{
	struct snic_port *port = snic_netdev(dev)->port;
	struct sockaddr *addr = p;
	int err;

	if (port->admin_mac && !port->trusted &&
	    ether_addr_to_u64(addr->sa_data) != port->admin_mac)
		return -EPERM;
	err = eth_mac_addr(dev, p);
	if (!err)
		WRITE_ONCE(port->mac, ether_addr_to_u64(dev->dev_addr));
	return err;
}

static const struct net_device_ops vf_ops = {
	.ndo_start_xmit = vf_xmit,
	.ndo_get_stats64 = dev_get_tstats64,
	.ndo_set_mac_address = vf_set_mac,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_change_mtu = snic_change_mtu,
	.ndo_vlan_rx_add_vid = snic_vlan_add,
	.ndo_vlan_rx_kill_vid = snic_vlan_kill,
};

static int vf_register(struct snic_port *port, struct net_device *dev)
{
	u8 mac[ETH_ALEN];
	int err;

	rtnl_lock();
	/* The address the host gave the VF, or else a new random one. */
	if (port->admin_mac) {
		u64_to_ether_addr(port->admin_mac, mac);
		eth_hw_addr_set(dev, mac);
	} else {
		eth_hw_addr_random(dev);
	}
	err = snic_netdev_register(dev);
	if (!err) {
		WRITE_ONCE(port->mac, ether_addr_to_u64(dev->dev_addr));
		rcu_assign_pointer(port->dev, dev);
		snic_link_update(port->pf->card);
	}
	rtnl_unlock();
	return err;
}

static int vf_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct snic_pf *pf = pci_iov_get_pf_drvdata(pdev, &snic_pf_driver);
	int vf = pci_iov_vf_id(pdev), err;
	struct net_device *dev;
	char name[IFNAMSIZ];

	/* A VF of the same identity on a card that is not ours. */
	if (IS_ERR_OR_NULL(pf) || vf < 0)
		return -ENODEV;
	err = snic_fault(pf->card, SNIC_FAULT_VF_PROBE);
	if (err)
		return err;
	err = pci_enable_device(pdev);
	if (err)
		return err;
	pci_set_master(pdev);

	snic_name_vf(name, pf->card, vf);
	dev = snic_netdev_alloc(name, pf->card, &pf->vfs[vf], &vf_ops);
	if (!dev) {
		err = -ENOMEM;
		goto err_disable;
	}
	dev->ethtool_ops = &snic_ethtool_ops;
	SET_NETDEV_DEV(dev, &pdev->dev);
	pci_set_drvdata(pdev, dev);
	if (snic_switchdev(pf)) {
		err = snic_vdpa_add(&pf->vfs[vf], pdev);
		if (err)
			goto err_free;
	}
	err = vf_register(&pf->vfs[vf], dev);
	if (err)
		goto err_vdpa;
	return 0;

err_vdpa:
	snic_vdpa_remove(&pf->vfs[vf]);
err_free:
	free_netdev(dev);
err_disable:
	pci_disable_device(pdev);
	return err;
}

static void vf_remove(struct pci_dev *pdev)
{
	struct net_device *dev = pci_get_drvdata(pdev);
	struct snic_port *port = snic_netdev(dev)->port;

	snic_vdpa_remove(port);
	rtnl_lock();
	RCU_INIT_POINTER(port->dev, NULL);
	WRITE_ONCE(port->mac, port->admin_mac);
	unregister_netdevice(dev);	/* waits for readers of port->dev */
	rtnl_unlock();
	free_netdev(dev);
	pci_disable_device(pdev);
}

struct pci_driver snic_vf_driver = {
	.name = SNIC_VF_DRIVER,
	.probe = vf_probe,
	.remove = vf_remove,
};
