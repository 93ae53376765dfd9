/* SPDX-License-Identifier: GPL-2.0 */
/*
 * An emulated SR-IOV network card: one PCI physical function, its virtual
 * functions and the embedded switch between them, with no hardware behind.
 *
 * Life times, from the longest:
 *   snic_card  the "silicon": configuration space, wire, fault settings. Lives
 *              from module load to unload, whatever drivers do meanwhile.
 *   snic_pf    the state of a bound PF driver, with one snic_port for the PF
 *              and one for each possible VF. VFs exist only inside it.
 *   net_device the PF's, a VF's (while its driver is bound), the wire's, and in
 *              switchdev mode a representor's for each VF there is.
 *
 * Locking: the eswitch mode, the number of VFs and the representors change under
 * the devlink lock, everything else of a port or a link under RTNL, which is the
 * inner one. The datapath takes no lock: net devices and the PF are found by RCU,
 * settings are single words read once, so that a frame sees an old or a new
 * setting and never a mix of both. The mode changes while no VF has a driver.
 */
#ifndef SLUICENIC_H
#define SLUICENIC_H

#include <linux/completion.h>
#include <linux/debugfs.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/if_vlan.h>
#include <linux/netdevice.h>
#include <linux/pci.h>
#include <linux/rtnetlink.h>
#include <linux/spinlock.h>
#include <net/devlink.h>

#define SNIC_PF_DRIVER	"sluicenic"
#define SNIC_VF_DRIVER	"sluicenicvf"
#define SNIC_VERSION	"1.0.0"

#define SNIC_MAX_CARDS	8
#define SNIC_MAX_VFS	64
#define SNIC_MAX_MTU	9600
#define SNIC_SPEED	SPEED_25000

/* VF i answers at routing id PF + 16 + i, so all 64 stay on the PF's bus. */
#define SNIC_VF_OFFSET	16

#if !defined(CONFIG_64BIT)
#error "port settings are single 64-bit words that the datapath reads without a lock"
#endif

enum snic_fault_op {
	SNIC_FAULT_SRIOV_ENABLE,
	SNIC_FAULT_VF_PROBE,
	SNIC_FAULT_VF_MAC,
	SNIC_FAULT_VF_VLAN,
	SNIC_FAULT_VF_SPOOFCHK,
	SNIC_FAULT_VF_TRUST,
	SNIC_FAULT_VF_LINK_STATE,
	SNIC_FAULT_VF_RATE,
	SNIC_FAULT_MTU,
	SNIC_FAULT_ESWITCH_MODE,
	SNIC_FAULT_OPS,
};

struct snic_fault {
	spinlock_t lock;	/* of all fields: some ops run without RTNL */
	unsigned int err;	/* positive errno, 0: no fault armed */
	unsigned int count;	/* failures left, 0: until disarmed */
	unsigned int skip;	/* calls to let through first */
	u64 hits;
};

struct snic_cfg {
	u8 val[PCI_CFG_SPACE_EXP_SIZE];
};

struct snic_pf;

struct snic_card {
#ifdef CONFIG_X86
	/* x86 reads its own fields through bus->sysdata: it must be this type. */
	struct pci_sysdata sysdata;
#endif
	unsigned int index;		/* from 0; the bus number is index + 1 */
	u16 vendor, device, vf_device;
	u8 mac[ETH_ALEN];		/* the PF's burnt-in address */
	char serial[17];

	struct pci_host_bridge *bridge;
	struct resource busn;
	struct snic_cfg pf_cfg, pf_wmask, vf_wmask;
	struct snic_cfg *vf_cfg;	/* [snic_total_vfs] */
	struct completion released;	/* no PCI object refers to us any more */

	struct net_device *wire;
	struct snic_pf __rcu *pf;	/* written under RTNL */

	struct snic_fault faults[SNIC_FAULT_OPS];
	u32 vf_op_delay_ms;
	struct dentry *debugfs;
};

struct snic_counters {
	atomic64_t rx_packets, rx_bytes, tx_packets, tx_bytes;
	atomic64_t rx_multicast, rx_broadcast;
	atomic64_t rx_dropped, tx_dropped;
	atomic64_t tx_spoofed;		/* part of tx_dropped: foreign source MAC */
	atomic64_t tx_vlan_denied;	/* part of tx_dropped: tag inside a port VLAN */
};

/* One side of the switch that has a function behind it: the PF or a VF. */
struct snic_port {
	struct snic_pf *pf;
	int vf;				/* -1: the PF */
	struct net_device __rcu *dev;	/* the function's netdev, if driven */
	struct net_device __rcu *rep;	/* a VF's representor in switchdev mode */
	/* PF: physical, always there; VF: there with its representor. */
	struct devlink_port dl_port;
	struct snic_vdpa_mgmt *vdpa;	/* a driven VF's in switchdev mode */

	u64 mac;			/* unicast filter; 0: none */
	u64 admin_mac;			/* set through the PF; 0: none */
	u32 vst;			/* see snic_vst_pack() */
	bool spoofchk, trusted;
	int link_state;			/* IFLA_VF_LINK_STATE_* */
	int link_set;			/* the same, as the host set it through the PF */
	int min_rate, max_rate;		/* Mbit/s, 0: none; stored only */
	/* VLANs the function asked for: [0] 802.1Q, [1] 802.1ad */
	DECLARE_BITMAP(vlans[2], VLAN_N_VID);
	struct snic_counters cnt;
};

struct snic_pf {
	struct snic_card *card;
	struct pci_dev *pdev;
	struct net_device *dev;
	struct snic_port port;
	struct snic_port *vfs;		/* [total_vfs] */
	int total_vfs;
	int num_vfs;			/* VFs that exist */
	u16 eswitch_mode;		/* DEVLINK_ESWITCH_MODE_* */
};

/* Private part of each netdev; the wire has no port, a representor its VF's. */
struct snic_netdev {
	struct snic_card *card;
	struct snic_port *port;
};

static inline struct snic_netdev *snic_netdev(struct net_device *dev)
{
	return netdev_priv(dev);
}

/* A port VLAN in one word: protocol, priority and id; 0 means none. */
static inline u32 snic_vst_pack(__be16 proto, u16 vid, u8 qos)
{
	return vid ? (u32)ntohs(proto) << 16 | qos << VLAN_PRIO_SHIFT | vid : 0;
}

static inline __be16 snic_vst_proto(u32 vst)
{
	return vst ? htons(vst >> 16) : htons(ETH_P_8021Q);
}

static inline u16 snic_vst_tci(u32 vst)
{
	return vst & 0xffff;
}

static inline u16 snic_vst_vid(u32 vst)
{
	return vst & VLAN_VID_MASK;
}

static inline bool snic_switchdev(const struct snic_pf *pf)
{
	return READ_ONCE(pf->eswitch_mode) == DEVLINK_ESWITCH_MODE_SWITCHDEV;
}

/* The port VLAN in effect: in switchdev mode there is none. */
static inline u32 snic_port_vst(const struct snic_port *port)
{
	return snic_switchdev(port->pf) ? 0 : READ_ONCE(port->vst);
}

/* main.c */
extern unsigned int snic_total_vfs;
extern int snic_domain, snic_numa_node;
void snic_name_pf(char *buf, const struct snic_card *card);
void snic_name_vf(char *buf, const struct snic_card *card, int vf);
void snic_name_rep(char *buf, const struct snic_card *card, int vf);
void snic_name_wire(char *buf, const struct snic_card *card);

/* card.c: the PCI side of the emulated card */
int snic_card_plug(struct snic_card *card);
void snic_card_unplug(struct snic_card *card);
struct snic_card *snic_card_of(struct pci_dev *pdev);

/* pf.c */
extern struct pci_driver snic_pf_driver;
void snic_link_update(struct snic_card *card);
struct net_device *snic_netdev_alloc(const char *name, struct snic_card *card,
				     struct snic_port *port,
				     const struct net_device_ops *ops);
int snic_netdev_register(struct net_device *dev);
int snic_change_mtu(struct net_device *dev, int mtu);
int snic_vlan_add(struct net_device *dev, __be16 proto, u16 vid);
int snic_vlan_kill(struct net_device *dev, __be16 proto, u16 vid);
void snic_port_init(struct snic_port *port, struct snic_pf *pf, int vf);

/* vfadmin.c: what the host may do to a VF through the PF */
int snic_set_vf_mac(struct net_device *dev, int vf, u8 *mac);
int snic_set_vf_vlan(struct net_device *dev, int vf, u16 vid, u8 qos, __be16 proto);
int snic_set_vf_rate(struct net_device *dev, int vf, int min, int max);
int snic_set_vf_spoofchk(struct net_device *dev, int vf, bool on);
int snic_set_vf_trust(struct net_device *dev, int vf, bool on);
int snic_set_vf_link_state(struct net_device *dev, int vf, int state);
int snic_get_vf_config(struct net_device *dev, int vf, struct ifla_vf_info *info);
int snic_get_vf_stats(struct net_device *dev, int vf, struct ifla_vf_stats *stats);

/* vf.c */
extern struct pci_driver snic_vf_driver;

/* wire.c */
int snic_wire_add(struct snic_card *card);
void snic_wire_remove(struct snic_card *card);

/* switch.c: the datapath; all consume the frame */
void snic_switch_from_port(struct snic_port *port, struct sk_buff *skb);
void snic_switch_from_rep(struct snic_port *port, struct sk_buff *skb);
void snic_switch_from_wire(struct snic_card *card, struct sk_buff *skb);

/* eswitch.c: devlink */
extern const struct devlink_ops snic_devlink_ops;
void snic_switch_id(const struct snic_card *card, struct netdev_phys_item_id *id);

/* rep.c: for all VFs there are, under the devlink lock */
int snic_reps_add(struct snic_pf *pf);
void snic_reps_remove(struct snic_pf *pf);

/* vdpa.c, of the VF's driver */
#if IS_BUILTIN(CONFIG_VDPA)
int snic_vdpa_add(struct snic_port *port, struct pci_dev *pdev);
void snic_vdpa_remove(struct snic_port *port);
#else
static inline int snic_vdpa_add(struct snic_port *port, struct pci_dev *pdev)
{
	return 0;
}

static inline void snic_vdpa_remove(struct snic_port *port)
{
}
#endif

/* ethtool.c */
extern const struct ethtool_ops snic_ethtool_ops, snic_link_ethtool_ops;

/* debugfs.c */
void snic_debugfs_init(void);
void snic_debugfs_exit(void);
void snic_debugfs_add(struct snic_card *card);
void snic_debugfs_remove(struct snic_card *card);
/* Returns 0 or the negative errno armed for this call of @op. */
int snic_fault(struct snic_card *card, enum snic_fault_op op);

#endif
