// SPDX-License-Identifier: GPL-2.0
/* The PF driver: its netdev, link, and the creation of VFs. */
#include "sluicenic.h"

#define SNIC_OFFLOADS	(NETIF_F_SG | NETIF_F_FRAGLIST | NETIF_F_HW_CSUM | \
			 NETIF_F_RXCSUM | NETIF_F_GSO_SOFTWARE | \
			 NETIF_F_GSO_ENCAP_ALL | NETIF_F_HIGHDMA)
#define SNIC_VLAN_TAGS	(NETIF_F_HW_VLAN_CTAG_TX | NETIF_F_HW_VLAN_CTAG_RX | \
			 NETIF_F_HW_VLAN_STAG_TX | NETIF_F_HW_VLAN_STAG_RX)
#define SNIC_VLAN_FILTERS (NETIF_F_HW_VLAN_CTAG_FILTER | NETIF_F_HW_VLAN_STAG_FILTER)

/* Allocates a netdev with what those of PF, VFs, wire and representors have in common. */
struct net_device *snic_netdev_alloc(const char *name, struct snic_card *card,
				     struct snic_port *port,
				     const struct net_device_ops *ops)
{
	struct net_device *dev = alloc_netdev(sizeof(struct snic_netdev), name,
					      NET_NAME_PREDICTABLE, ether_setup);

	if (!dev)
		return NULL;
	*snic_netdev(dev) = (struct snic_netdev) { .card = card, .port = port };
	dev->netdev_ops = ops;
	dev->lltx = true;
	dev->pcpu_stat_type = NETDEV_PCPU_STAT_TSTATS;
	dev->min_mtu = ETH_MIN_MTU;
	dev->max_mtu = SNIC_MAX_MTU;
	dev->priv_flags |= IFF_NO_QUEUE | IFF_LIVE_ADDR_CHANGE;
	/* A sent frame becomes the received one: it must be the sender's no more. */
	dev->priv_flags &= ~IFF_TX_SKB_SHARING;
	dev->features |= SNIC_OFFLOADS | SNIC_VLAN_TAGS;
	dev->vlan_features |= SNIC_OFFLOADS;
	dev->hw_enc_features |= SNIC_OFFLOADS;
	/* Functions filter VLANs, the others take all. */
	if (ops->ndo_vlan_rx_add_vid)
		dev->features |= SNIC_VLAN_FILTERS;
	dev->hw_features |= SNIC_OFFLOADS & ~NETIF_F_HIGHDMA;
	netif_carrier_off(dev);
	return dev;
}

/*
 * Registers under RTNL. Where the name of the template is taken, the kernel
 * chooses one, as it does for a card whose driver has no say in names.
 */
int snic_netdev_register(struct net_device *dev)
{
	if (__dev_get_by_name(dev_net(dev), dev->name)) {
		strscpy(dev->name, "eth%d", sizeof(dev->name));
		dev->name_assign_type = NET_NAME_ENUM;
	}
	return register_netdevice(dev);
}

int snic_change_mtu(struct net_device *dev, int mtu)
{
	int err = snic_fault(snic_netdev(dev)->card, SNIC_FAULT_MTU);

	if (!err)
		WRITE_ONCE(dev->mtu, mtu);
	return err;
}

int snic_vlan_add(struct net_device *dev, __be16 proto, u16 vid)
{
	struct snic_port *port = snic_netdev(dev)->port;
	u32 vst = snic_port_vst(port);

	/* Inside a port VLAN a VF has no VLANs of its own; id 0 is "untagged". */
	if (vid && vst && snic_vst_proto(vst) == proto)
		return -EPERM;
	set_bit(vid, port->vlans[proto == htons(ETH_P_8021AD)]);
	return 0;
}

int snic_vlan_kill(struct net_device *dev, __be16 proto, u16 vid)
{
	clear_bit(vid, snic_netdev(dev)->port->vlans[proto == htons(ETH_P_8021AD)]);
	return 0;
}

static void set_carrier(struct net_device *dev, bool on)
{
	if (on)
		netif_carrier_on(dev);
	else
		netif_carrier_off(dev);
}

/*
 * The cable has a link when both its ends are up. A VF follows it, unless the
 * host forces its link state. Under RTNL.
 */
void snic_link_update(struct snic_card *card)
{
	struct snic_pf *pf = rtnl_dereference(card->pf);
	bool up = pf && netif_running(pf->dev) && netif_running(card->wire);
	int i;

	set_carrier(card->wire, up);
	if (!pf)
		return;
	set_carrier(pf->dev, up);
	for (i = 0; i < pf->num_vfs; i++) {
		struct net_device *dev = rtnl_dereference(pf->vfs[i].dev);

		if (dev)
			set_carrier(dev, pf->vfs[i].link_state == IFLA_VF_LINK_STATE_ENABLE ||
				    (pf->vfs[i].link_state == IFLA_VF_LINK_STATE_AUTO && up));
	}
}

void snic_port_init(struct snic_port *port, struct snic_pf *pf, int vf)
{
	memset(port, 0, sizeof(*port));
	port->pf = pf;
	port->vf = vf;
	port->spoofchk = vf >= 0;
	port->link_state = port->link_set = IFLA_VF_LINK_STATE_AUTO;
}

static netdev_tx_t pf_xmit(struct sk_buff *skb, struct net_device *dev)
{
	dev_sw_netstats_tx_add(dev, 1, skb->len);
	snic_switch_from_port(snic_netdev(dev)->port, skb);
	return NETDEV_TX_OK;
}

static int pf_open(struct net_device *dev)
{
	snic_link_update(snic_netdev(dev)->card);
	return 0;
}

static int pf_stop(struct net_device *dev)
{
	snic_link_update(snic_netdev(dev)->card);
	return 0;
}

static int pf_set_mac(struct net_device *dev, void *addr)
{
	int err = eth_mac_addr(dev, addr);

	if (!err)
		WRITE_ONCE(snic_netdev(dev)->port->mac,
			   ether_addr_to_u64(dev->dev_addr));
	return err;
}

/* A devlink port of a switch is one for good, which the uplink is not. */
static int pf_port_parent_id(struct net_device *dev, struct netdev_phys_item_id *id)
{
	struct snic_netdev *priv = snic_netdev(dev);

	if (!snic_switchdev(priv->port->pf))
		return -EOPNOTSUPP;
	snic_switch_id(priv->card, id);
	return 0;
}

static const struct net_device_ops pf_ops = {
	.ndo_open = pf_open,
	.ndo_stop = pf_stop,
	.ndo_start_xmit = pf_xmit,
	.ndo_get_stats64 = dev_get_tstats64,
	.ndo_set_mac_address = pf_set_mac,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_change_mtu = snic_change_mtu,
	.ndo_vlan_rx_add_vid = snic_vlan_add,
	.ndo_vlan_rx_kill_vid = snic_vlan_kill,
	.ndo_set_vf_mac = snic_set_vf_mac,
	.ndo_set_vf_vlan = snic_set_vf_vlan,
	.ndo_set_vf_rate = snic_set_vf_rate,
	.ndo_set_vf_spoofchk = snic_set_vf_spoofchk,
	.ndo_set_vf_trust = snic_set_vf_trust,
	.ndo_set_vf_link_state = snic_set_vf_link_state,
	.ndo_get_vf_config = snic_get_vf_config,
	.ndo_get_vf_stats = snic_get_vf_stats,
	.ndo_get_port_parent_id = pf_port_parent_id,
};

/* Makes the ports of n VFs, whose PCI functions come next. */
static int add_ports(struct snic_pf *pf, int n)
{
	struct devlink *devlink = priv_to_devlink(pf);
	int i, err = 0;

	devl_lock(devlink);
	rtnl_lock();
	for (i = 0; i < n; i++)
		snic_port_init(&pf->vfs[i], pf, i);
	WRITE_ONCE(pf->num_vfs, n);
	rtnl_unlock();
	if (snic_switchdev(pf))
		err = snic_reps_add(pf);
	if (err)
		WRITE_ONCE(pf->num_vfs, 0);
	devl_unlock(devlink);
	return err;
}

static void remove_ports(struct snic_pf *pf)
{
	struct devlink *devlink = priv_to_devlink(pf);

	devl_lock(devlink);
	snic_reps_remove(pf);
	WRITE_ONCE(pf->num_vfs, 0);
	/* A frame on its way may still walk the old number of ports. */
	synchronize_net();
	devl_unlock(devlink);
}

static void disable_vfs(struct snic_pf *pf)
{
	pci_disable_sriov(pf->pdev);
	remove_ports(pf);
}

static int pf_sriov_configure(struct pci_dev *pdev, int n)
{
	struct snic_pf *pf = pci_get_drvdata(pdev);
	int err;

	if (!n) {
		disable_vfs(pf);
		return 0;
	}
	err = snic_fault(pf->card, SNIC_FAULT_SRIOV_ENABLE);
	if (err)
		return err;

	/* VF drivers probe inside pci_enable_sriov(): their ports come first. */
	err = add_ports(pf, n);
	if (err)
		return err;
	err = pci_enable_sriov(pdev, n);
	if (err) {
		remove_ports(pf);
		return err;
	}
	return n;
}

static int pf_register(struct snic_pf *pf)
{
	int err;

	rtnl_lock();
	err = snic_netdev_register(pf->dev);
	if (!err) {
		rcu_assign_pointer(pf->port.dev, pf->dev);
		rcu_assign_pointer(pf->card->pf, pf);
		snic_link_update(pf->card);
	}
	rtnl_unlock();
	return err;
}

static void pf_unregister(struct snic_pf *pf)
{
	rtnl_lock();
	RCU_INIT_POINTER(pf->card->pf, NULL);
	RCU_INIT_POINTER(pf->port.dev, NULL);
	snic_link_update(pf->card);
	unregister_netdevice(pf->dev);	/* waits for readers of both pointers */
	rtnl_unlock();
}

static int pf_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct devlink_port_attrs attrs = {
		.flavour = DEVLINK_PORT_FLAVOUR_PHYSICAL,
	};
	struct snic_card *card = snic_card_of(pdev);
	struct devlink *devlink;
	struct net_device *dev;
	char name[IFNAMSIZ];
	struct snic_pf *pf;
	int err;

	if (!card)
		return -ENODEV;
	err = pci_enable_device(pdev);
	if (err)
		return err;
	pci_set_master(pdev);

	devlink = devlink_alloc(&snic_devlink_ops, sizeof(*pf), &pdev->dev);
	if (!devlink) {
		err = -ENOMEM;
		goto err_disable;
	}
	pf = devlink_priv(devlink);
	pf->card = card;
	pf->pdev = pdev;
	pf->total_vfs = pci_sriov_get_totalvfs(pdev);
	snic_port_init(&pf->port, pf, -1);
	pf->vfs = kvcalloc(pf->total_vfs, sizeof(*pf->vfs), GFP_KERNEL);
	if (!pf->vfs) {
		err = -ENOMEM;
		goto err_devlink;
	}

	snic_name_pf(name, card);
	dev = snic_netdev_alloc(name, card, &pf->port, &pf_ops);
	if (!dev) {
		err = -ENOMEM;
		goto err_vfs;
	}
	pf->dev = dev;
	dev->hw_features |= NETIF_F_HW_TC;	/* can be turned on, and no rule is taken */
	dev->ethtool_ops = &snic_ethtool_ops;
	eth_hw_addr_set(dev, card->mac);
	pf->port.mac = ether_addr_to_u64(card->mac);
	SET_NETDEV_DEV(dev, &pdev->dev);
	pci_set_drvdata(pdev, pf);

	devl_lock(devlink);
	devlink_port_attrs_set(&pf->port.dl_port, &attrs);
	err = devl_port_register(devlink, &pf->port.dl_port, 0);
	if (err)
		goto err_unlock;
	SET_NETDEV_DEVLINK_PORT(dev, &pf->port.dl_port);
	err = pf_register(pf);
	if (err)
		goto err_port;
	devl_register(devlink);
	devl_unlock(devlink);
	return 0;

err_port:
	devl_port_unregister(&pf->port.dl_port);
err_unlock:
	devl_unlock(devlink);
	free_netdev(dev);
err_vfs:
	kvfree(pf->vfs);
err_devlink:
	devlink_free(devlink);
err_disable:
	pci_disable_device(pdev);
	return err;
}

static void pf_remove(struct pci_dev *pdev)
{
	struct snic_pf *pf = pci_get_drvdata(pdev);
	struct devlink *devlink = priv_to_devlink(pf);

	disable_vfs(pf);
	devl_lock(devlink);
	devl_unregister(devlink);
	pf_unregister(pf);
	devl_port_unregister(&pf->port.dl_port);
	devl_unlock(devlink);
	free_netdev(pf->dev);
	kvfree(pf->vfs);
	devlink_free(devlink);
	pci_disable_device(pdev);
}

struct pci_driver snic_pf_driver = {
	.probe = pf_probe,
	.remove = pf_remove,
	.sriov_configure = pf_sriov_configure,
};
