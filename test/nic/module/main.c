// SPDX-License-Identifier: GPL-2.0
/* Module parameters, load and unload. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include "sluicenic.h"

static unsigned int cards = 1;
module_param(cards, uint, 0444);
MODULE_PARM_DESC(cards, "number of cards, 1 to 8; card n is at bus n");

unsigned int snic_total_vfs = 8;
module_param_named(total_vfs, snic_total_vfs, uint, 0444);
MODULE_PARM_DESC(total_vfs, "VFs that each card can have, 1 to 64");

/* Identity, one value for each card; the last one counts for the rest. */
static unsigned short vendor[SNIC_MAX_CARDS] = { 0x8086 };
static unsigned short device[SNIC_MAX_CARDS] = { 0x159b };
static unsigned short vf_device[SNIC_MAX_CARDS] = { 0x1889 };
static unsigned int n_vendor = 1, n_device = 1, n_vf_device = 1;
module_param_array(vendor, ushort, &n_vendor, 0444);
MODULE_PARM_DESC(vendor, "PCI vendor id of each card");
module_param_array(device, ushort, &n_device, 0444);
MODULE_PARM_DESC(device, "PCI device id of each card's PF");
module_param_array(vf_device, ushort, &n_vf_device, 0444);
MODULE_PARM_DESC(vf_device, "PCI device id of each card's VFs");

/*
 * On x86 the firmware's bridge owns the whole of domain 0; User-Mode Linux has
 * no other domain and nothing in it.
 */
int snic_domain = IS_ENABLED(CONFIG_X86) ? 1 : 0;
int snic_numa_node = NUMA_NO_NODE;
#ifdef CONFIG_X86
module_param_named(domain, snic_domain, int, 0444);
MODULE_PARM_DESC(domain, "PCI domain of the cards, 0 to 0xffff");
module_param_named(numa_node, snic_numa_node, int, 0444);
MODULE_PARM_DESC(numa_node, "NUMA node of the cards, -1 for none");
#endif

static char *pf_driver = SNIC_PF_DRIVER;
module_param(pf_driver, charp, 0444);
MODULE_PARM_DESC(pf_driver, "name of the PF's driver; as \"ice\" it has ice's order of changes");

static char *pf_name = "ens%cf0";
static char *vf_name = "ens%cf0v%v";
static char *rep_name = "ens%cf0npf0vf%v";
static char *wire_name = "wire%i";
module_param(pf_name, charp, 0444);
MODULE_PARM_DESC(pf_name, "PF netdev name; %c: card from 1, %i: card from 0");
module_param(vf_name, charp, 0444);
MODULE_PARM_DESC(vf_name, "VF netdev name; as pf_name, and %v: VF index");
module_param(rep_name, charp, 0444);
MODULE_PARM_DESC(rep_name, "representor netdev name; as vf_name");
module_param(wire_name, charp, 0444);
MODULE_PARM_DESC(wire_name, "wire netdev name; as pf_name");

static struct snic_card *snic_cards[SNIC_MAX_CARDS];
static struct pci_device_id pf_ids[SNIC_MAX_CARDS + 1];
static struct pci_device_id vf_ids[SNIC_MAX_CARDS + 1];

/* Expands a name template; the names were checked at load to fit IFNAMSIZ. */
static int expand_name(char *buf, const char *tmpl, unsigned int index, int vf)
{
	int n = 0;

	for (; *tmpl; tmpl++) {
		char c = *tmpl;

		if (c != '%') {
			if (n < IFNAMSIZ)
				buf[min(n, IFNAMSIZ - 1)] = c;
			n++;
			continue;
		}
		c = *++tmpl;
		if (c == 'v' && vf < 0)
			return -EINVAL;
		if (c != 'c' && c != 'i' && c != 'v')
			return -EINVAL;
		n += snprintf(buf + min(n, IFNAMSIZ - 1),
			      IFNAMSIZ - min(n, IFNAMSIZ - 1), "%u",
			      c == 'c' ? index + 1 : c == 'i' ? index : vf);
	}
	if (n >= IFNAMSIZ)
		return -ENAMETOOLONG;
	buf[n] = '\0';
	return dev_valid_name(buf) ? 0 : -EINVAL;
}

void snic_name_pf(char *buf, const struct snic_card *card)
{
	expand_name(buf, pf_name, card->index, -1);
}

void snic_name_vf(char *buf, const struct snic_card *card, int vf)
{
	expand_name(buf, vf_name, card->index, vf);
}

void snic_name_rep(char *buf, const struct snic_card *card, int vf)
{
	expand_name(buf, rep_name, card->index, vf);
}

void snic_name_wire(char *buf, const struct snic_card *card)
{
	expand_name(buf, wire_name, card->index, -1);
}

static int check_params(void)
{
	char buf[IFNAMSIZ];
	unsigned int i;
	int err;

	if (!cards || cards > SNIC_MAX_CARDS) {
		pr_err("cards=%u is not 1 to %d\n", cards, SNIC_MAX_CARDS);
		return -EINVAL;
	}
	if (!snic_total_vfs || snic_total_vfs > SNIC_MAX_VFS) {
		pr_err("total_vfs=%u is not 1 to %d\n", snic_total_vfs, SNIC_MAX_VFS);
		return -EINVAL;
	}
	/* Some readers of PCI addresses take four digits of domain only. */
	if (snic_domain < 0 || snic_domain > 0xffff) {
		pr_err("domain=%d is not 0 to 65535\n", snic_domain);
		return -EINVAL;
	}
	for (i = 0; i < cards; i++) {
		err = expand_name(buf, pf_name, i, -1);
		if (!err)
			err = expand_name(buf, vf_name, i, snic_total_vfs - 1);
		if (!err)
			err = expand_name(buf, rep_name, i, snic_total_vfs - 1);
		if (!err)
			err = expand_name(buf, wire_name, i, -1);
		if (err) {
			pr_err("a netdev name template is not valid for card %u: %d\n",
			       i + 1, err);
			return err;
		}
	}
	return 0;
}

static int card_add(unsigned int index)
{
	struct snic_card *card;
	int i, err;

	card = kvzalloc(sizeof(*card), GFP_KERNEL);
	if (!card)
		return -ENOMEM;
	card->vf_cfg = kvcalloc(snic_total_vfs, sizeof(*card->vf_cfg), GFP_KERNEL);
	if (!card->vf_cfg) {
		kvfree(card);
		return -ENOMEM;
	}
	card->index = index;
	card->vendor = vendor[min(index, n_vendor - 1)];
	card->device = device[min(index, n_device - 1)];
	card->vf_device = vf_device[min(index, n_vf_device - 1)];
	eth_random_addr(card->mac);
	snprintf(card->serial, sizeof(card->serial), "SN%pm", card->mac);
	for (i = 0; i < SNIC_FAULT_OPS; i++)
		spin_lock_init(&card->faults[i].lock);

	err = snic_wire_add(card);
	if (err)
		goto err_free;
	err = snic_card_plug(card);
	if (err)
		goto err_wire;
	snic_debugfs_add(card);
	snic_cards[index] = card;
	return 0;

err_wire:
	snic_wire_remove(card);
err_free:
	kvfree(card->vf_cfg);
	kvfree(card);
	return err;
}

static void card_del(struct snic_card *card)
{
	snic_debugfs_remove(card);
	snic_card_unplug(card);
	snic_wire_remove(card);
	kvfree(card->vf_cfg);
	kvfree(card);
}

static void cards_del(void)
{
	int i;

	for (i = SNIC_MAX_CARDS - 1; i >= 0; i--)
		if (snic_cards[i])
			card_del(snic_cards[i]);
}

static int __init snic_init(void)
{
	unsigned int i;
	int err;

	err = check_params();
	if (err)
		return err;
	for (i = 0; i < cards; i++) {
		u16 v = vendor[min(i, n_vendor - 1)];

		pf_ids[i] = (struct pci_device_id) {
			PCI_DEVICE(v, device[min(i, n_device - 1)])
		};
		vf_ids[i] = (struct pci_device_id) {
			PCI_DEVICE(v, vf_device[min(i, n_vf_device - 1)])
		};
	}
	snic_pf_driver.name = pf_driver;
	snic_pf_driver.id_table = pf_ids;
	snic_vf_driver.id_table = vf_ids;

	snic_debugfs_init();
	err = pci_register_driver(&snic_vf_driver);
	if (err)
		goto err_debugfs;
	err = pci_register_driver(&snic_pf_driver);
	if (err)
		goto err_vf;
	for (i = 0; i < cards; i++) {
		err = card_add(i);
		if (err) {
			pr_err("card %u could not be added: %d\n", i + 1, err);
			goto err_cards;
		}
	}
	return 0;

err_cards:
	cards_del();
	pci_unregister_driver(&snic_pf_driver);
err_vf:
	pci_unregister_driver(&snic_vf_driver);
err_debugfs:
	snic_debugfs_exit();
	return err;
}

static void __exit snic_exit(void)
{
	/* Cards first: unplugging runs the drivers' remove, VFs before their PF. */
	cards_del();
	pci_unregister_driver(&snic_pf_driver);
	pci_unregister_driver(&snic_vf_driver);
	snic_debugfs_exit();
}

module_init(snic_init);
module_exit(snic_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Emulated SR-IOV network card for tests");
MODULE_VERSION(SNIC_VERSION);
