// SPDX-License-Identifier: GPL-2.0
/*
 * The card as PCI sees it: a host bridge of its own with one bus, on it a PF
 * with the SR-IOV capability, and VFs that answer once VF Enable is set.
 * There are no BARs: with six empty VF BARs the SR-IOV code asks for none.
 */
#include "sluicenic.h"
#include "vsec.h"

#define PCIE_POS	0x40
#define SRIOV_POS	0x100
#define VSEC_POS	0x140
#define VSEC_LEN	8

static void put16(u8 *p, int off, u16 v)
{
	put_unaligned_le16(v, p + off);
}

static void put32(u8 *p, int off, u32 v)
{
	put_unaligned_le32(v, p + off);
}

static struct snic_card *bus_card(struct pci_bus *bus)
{
#ifdef CONFIG_X86
	return container_of(bus->sysdata, struct snic_card, sysdata);
#else
	return bus->sysdata;
#endif
}

/* Finds the function at a routing id; NULL when nothing answers there. */
static struct snic_cfg *find_function(struct snic_card *card, struct pci_bus *bus,
				      unsigned int devfn, struct snic_cfg **wmask)
{
	const u8 *sriov = card->pf_cfg.val + SRIOV_POS;
	int vf = (int)devfn - SNIC_VF_OFFSET;

	if (bus->number != card->busn.start)
		return NULL;
	if (!devfn) {
		*wmask = &card->pf_wmask;
		return &card->pf_cfg;
	}
	if (!(get_unaligned_le16(sriov + PCI_SRIOV_CTRL) & PCI_SRIOV_CTRL_VFE))
		return NULL;
	if (vf < 0 || vf >= snic_total_vfs ||
	    vf >= get_unaligned_le16(sriov + PCI_SRIOV_NUM_VF))
		return NULL;
	*wmask = &card->vf_wmask;
	return &card->vf_cfg[vf];
}

static int cfg_read(struct pci_bus *bus, unsigned int devfn, int where, int size,
		    u32 *val)
{
	struct snic_cfg *wmask, *cfg;

	*val = ~0;
	cfg = find_function(bus_card(bus), bus, devfn, &wmask);
	if (!cfg || where + size > PCI_CFG_SPACE_EXP_SIZE)
		return PCIBIOS_DEVICE_NOT_FOUND;
	switch (size) {
	case 1:
		*val = cfg->val[where];
		break;
	case 2:
		*val = get_unaligned_le16(cfg->val + where);
		break;
	case 4:
		*val = get_unaligned_le32(cfg->val + where);
		break;
	}
	return PCIBIOS_SUCCESSFUL;
}

static int cfg_write(struct pci_bus *bus, unsigned int devfn, int where, int size,
		     u32 val)
{
	struct snic_cfg *wmask, *cfg;
	int i;

	cfg = find_function(bus_card(bus), bus, devfn, &wmask);
	if (!cfg || where + size > PCI_CFG_SPACE_EXP_SIZE)
		return PCIBIOS_DEVICE_NOT_FOUND;
	for (i = where; i < where + size; i++, val >>= 8)
		cfg->val[i] = (cfg->val[i] & ~wmask->val[i]) |
			      (val & wmask->val[i]);
	return PCIBIOS_SUCCESSFUL;
}

static struct pci_ops snic_pci_ops = {
	.read = cfg_read,
	.write = cfg_write,
};

/* What PF and VF have in common: type 0 header, PCI Express endpoint with FLR. */
static void fill_header(struct snic_card *card, u8 *c)
{
	put32(c, PCI_CLASS_REVISION, PCI_CLASS_NETWORK_ETHERNET << 16 | 1);
	put16(c, PCI_STATUS, PCI_STATUS_CAP_LIST);
	put16(c, PCI_SUBSYSTEM_VENDOR_ID, card->vendor);
	put16(c, PCI_SUBSYSTEM_ID, 1);
	c[PCI_CAPABILITY_LIST] = PCIE_POS;
	c[PCIE_POS] = PCI_CAP_ID_EXP;
	/* Integrated endpoint: there is no root port above it. */
	put16(c, PCIE_POS + PCI_EXP_FLAGS, PCI_EXP_TYPE_RC_END << 4 | 2);
	put32(c, PCIE_POS + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_FLR | PCI_EXP_DEVCAP_RBER);
}

static void fill_wmask(u8 *m)
{
	put16(m, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
			      PCI_COMMAND_INTX_DISABLE);
	m[PCI_INTERRUPT_LINE] = 0xff;
	m[PCI_CACHE_LINE_SIZE] = 0xff;
	/* Initiate FLR, the top bit, reads as zero. */
	put16(m, PCIE_POS + PCI_EXP_DEVCTL, 0x7fff);
}

static void fill_config(struct snic_card *card)
{
	u8 *c = card->pf_cfg.val, *m = card->pf_wmask.val;
	unsigned int i;

	fill_header(card, c);
	fill_wmask(m);
	put16(c, PCI_VENDOR_ID, card->vendor);
	put16(c, PCI_DEVICE_ID, card->device);

	c += SRIOV_POS;
	m += SRIOV_POS;
	put32(c, 0, PCI_EXT_CAP_ID_SRIOV | 1 << 16 | VSEC_POS << 20);
	put16(c, PCI_SRIOV_INITIAL_VF, snic_total_vfs);
	put16(c, PCI_SRIOV_TOTAL_VF, snic_total_vfs);
	put16(c, PCI_SRIOV_VF_OFFSET, SNIC_VF_OFFSET);
	put16(c, PCI_SRIOV_VF_STRIDE, 1);
	put16(c, PCI_SRIOV_VF_DID, card->vf_device);
	put32(c, PCI_SRIOV_SUP_PGSIZE, 0x553);	/* the sizes the standard demands */
	put32(c, PCI_SRIOV_SYS_PGSIZE, 1);
	put16(m, PCI_SRIOV_CTRL, PCI_SRIOV_CTRL_VFE | PCI_SRIOV_CTRL_MSE);
	put16(m, PCI_SRIOV_NUM_VF, 0xffff);
	put32(m, PCI_SRIOV_SYS_PGSIZE, ~0U);

	c = card->pf_cfg.val + VSEC_POS;
	put32(c, 0, PCI_EXT_CAP_ID_VNDR | 1 << 16);
	put32(c, PCI_VNDR_HEADER, SNIC_VSEC_ID | 1 << 16 | VSEC_LEN << 20);

	/* The standard makes a VF's own ids read as all ones. */
	fill_wmask(card->vf_wmask.val);
	for (i = 0; i < snic_total_vfs; i++) {
		fill_header(card, card->vf_cfg[i].val);
		put16(card->vf_cfg[i].val, PCI_VENDOR_ID, 0xffff);
		put16(card->vf_cfg[i].val, PCI_DEVICE_ID, 0xffff);
	}
}

static void bridge_release(struct pci_host_bridge *bridge)
{
	struct snic_card *card = bridge->release_data;

	complete(&card->released);
}

int snic_card_plug(struct snic_card *card)
{
	struct pci_host_bridge *bridge;
	int err;

	fill_config(card);
	init_completion(&card->released);
	card->busn = (struct resource) {
		.name = SNIC_PF_DRIVER,
		.start = card->index + 1,
		.end = card->index + 1,
		.flags = IORESOURCE_BUS,
	};
	bridge = pci_alloc_host_bridge(0);
	if (!bridge)
		return -ENOMEM;
	pci_set_host_bridge_release(bridge, bridge_release, card);
	pci_add_resource(&bridge->windows, &card->busn);
	bridge->ops = &snic_pci_ops;
#ifdef CONFIG_X86
	card->sysdata.domain = snic_domain;
	card->sysdata.node = snic_numa_node;
	bridge->sysdata = &card->sysdata;
#else
	bridge->sysdata = card;
#endif
	err = pci_host_probe(bridge);
	if (err) {
		pci_free_host_bridge(bridge);
		wait_for_completion(&card->released);
		return err;
	}
	card->bridge = bridge;
	return 0;
}

void snic_card_unplug(struct snic_card *card)
{
	pci_lock_rescan_remove();
	pci_stop_root_bus(card->bridge->bus);
	pci_remove_root_bus(card->bridge->bus);
	pci_unlock_rescan_remove();
	pci_free_host_bridge(card->bridge);
	/* Whoever still holds a function may read its configuration space. */
	wait_for_completion(&card->released);
}

/* NULL for a function of the same identity that is not ours. */
struct snic_card *snic_card_of(struct pci_dev *pdev)
{
	return pdev->bus->ops == &snic_pci_ops ? bus_card(pdev->bus) : NULL;
}
