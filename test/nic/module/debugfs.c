// SPDX-License-Identifier: GPL-2.0
/*
 * Test controls: /sys/kernel/debug/sluicenic/<PF address>/
 *   fail_<op>     "errno [count [skip]]": let skip calls pass, then fail count
 *                 of them (default 1, 0: all) with errno; errno 0 disarms
 *   vf_op_delay_ms  how long each change of a VF through the PF takes
 *   dump          what the card holds, independent of rtnetlink
 */
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include "sluicenic.h"

static struct dentry *root;

static const char * const op_names[SNIC_FAULT_OPS] = {
	[SNIC_FAULT_SRIOV_ENABLE] = "fail_sriov_enable",
	[SNIC_FAULT_VF_PROBE] = "fail_vf_probe",
	[SNIC_FAULT_VF_MAC] = "fail_vf_mac",
	[SNIC_FAULT_VF_VLAN] = "fail_vf_vlan",
	[SNIC_FAULT_VF_SPOOFCHK] = "fail_vf_spoofchk",
	[SNIC_FAULT_VF_TRUST] = "fail_vf_trust",
	[SNIC_FAULT_VF_LINK_STATE] = "fail_vf_link_state",
	[SNIC_FAULT_VF_RATE] = "fail_vf_rate",
	[SNIC_FAULT_MTU] = "fail_mtu",
	[SNIC_FAULT_ESWITCH_MODE] = "fail_eswitch_mode",
};

int snic_fault(struct snic_card *card, enum snic_fault_op op)
{
	struct snic_fault *f = &card->faults[op];
	int err = 0;

	spin_lock(&f->lock);
	if (f->err && f->skip) {
		f->skip--;
	} else if (f->err) {
		err = -(int)f->err;
		f->hits++;
		if (f->count && !--f->count)
			f->err = 0;
	}
	spin_unlock(&f->lock);
	return err;
}

static ssize_t fault_write(struct file *file, const char __user *ubuf, size_t len,
			   loff_t *pos)
{
	struct snic_fault *f = file->private_data;
	unsigned int err, count = 1, skip = 0;
	char buf[48] = {};

	if (len >= sizeof(buf))
		return -EINVAL;
	if (copy_from_user(buf, ubuf, len))
		return -EFAULT;
	if (sscanf(buf, "%u %u %u", &err, &count, &skip) < 1 || err > MAX_ERRNO)
		return -EINVAL;
	spin_lock(&f->lock);
	f->err = err;
	f->count = count;
	f->skip = skip;
	spin_unlock(&f->lock);
	return len;
}

static ssize_t fault_read(struct file *file, char __user *ubuf, size_t len, loff_t *pos)
{
	struct snic_fault *f = file->private_data;
	char buf[96];
	int n;

	spin_lock(&f->lock);
	n = scnprintf(buf, sizeof(buf), "errno=%u count=%u skip=%u hits=%llu\n",
		      f->err, f->count, f->skip, f->hits);
	spin_unlock(&f->lock);
	return simple_read_from_buffer(ubuf, len, pos, buf, n);
}

static const struct file_operations fault_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = fault_read,
	.write = fault_write,
};

static void dump_port(struct seq_file *s, struct snic_port *port)
{
	static const char * const links[] = { "auto", "enable", "disable" };
	struct net_device *dev = rtnl_dereference(port->dev);
	struct net_device *rep = rtnl_dereference(port->rep);
	u8 mac[ETH_ALEN], admin[ETH_ALEN];

	u64_to_ether_addr(port->mac, mac);
	u64_to_ether_addr(port->admin_mac, admin);
	if (port->vf < 0)
		seq_puts(s, "pf");
	else
		seq_printf(s, "vf=%d", port->vf);
	seq_printf(s, " netdev=%s mac=%pM", dev ? dev->name : "-", mac);
	if (dev)
		seq_printf(s, " netns=%u up=%d carrier=%d mtu=%u", dev_net(dev)->ns.inum,
			   !!(dev->flags & IFF_UP), netif_carrier_ok(dev), dev->mtu);
	if (rep)
		seq_printf(s, " rep=%s", rep->name);
	if (port->vf >= 0)
		seq_printf(s, " admin_mac=%pM vlan=%u qos=%u proto=%s spoofchk=%d trust=%d link=%s min_rate=%d max_rate=%d",
			   admin, snic_vst_vid(port->vst),
			   snic_vst_tci(port->vst) >> VLAN_PRIO_SHIFT,
			   snic_vst_proto(port->vst) == htons(ETH_P_8021AD) ? "802.1ad" : "802.1Q",
			   port->spoofchk, port->trusted, links[port->link_state],
			   port->min_rate, port->max_rate);
	seq_printf(s, " rx_packets=%lld tx_packets=%lld rx_dropped=%lld tx_dropped=%lld tx_spoofed=%lld tx_vlan_denied=%lld\n",
		   atomic64_read(&port->cnt.rx_packets),
		   atomic64_read(&port->cnt.tx_packets),
		   atomic64_read(&port->cnt.rx_dropped),
		   atomic64_read(&port->cnt.tx_dropped),
		   atomic64_read(&port->cnt.tx_spoofed),
		   atomic64_read(&port->cnt.tx_vlan_denied));
}

static int dump_show(struct seq_file *s, void *unused)
{
	struct snic_card *card = s->private;
	struct snic_pf *pf;
	int i;

	rtnl_lock();
	pf = rtnl_dereference(card->pf);
	seq_printf(s, "card=%u wire=%s link=%d driver=%d num_vfs=%d switchdev=%d\n", card->index,
		   card->wire->name, netif_carrier_ok(card->wire), !!pf,
		   pf ? pf->num_vfs : 0, pf && snic_switchdev(pf));
	if (pf) {
		dump_port(s, &pf->port);
		for (i = 0; i < pf->num_vfs; i++)
			dump_port(s, &pf->vfs[i]);
	}
	rtnl_unlock();
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(dump);

void snic_debugfs_add(struct snic_card *card)
{
	char name[32];
	int i;

	snprintf(name, sizeof(name), "%04x:%02x:00.0", snic_domain, card->index + 1);
	card->debugfs = debugfs_create_dir(name, root);
	for (i = 0; i < SNIC_FAULT_OPS; i++)
		debugfs_create_file(op_names[i], 0600, card->debugfs, &card->faults[i],
				    &fault_fops);
	debugfs_create_u32("vf_op_delay_ms", 0600, card->debugfs, &card->vf_op_delay_ms);
	debugfs_create_file("dump", 0400, card->debugfs, card, &dump_fops);
}

void snic_debugfs_remove(struct snic_card *card)
{
	debugfs_remove_recursive(card->debugfs);
}

void snic_debugfs_init(void)
{
	root = debugfs_create_dir(SNIC_PF_DRIVER, NULL);
}

void snic_debugfs_exit(void)
{
	debugfs_remove_recursive(root);
}
