// SPDX-License-Identifier: GPL-2.0
/*
 * An IOMMU for the emulated cards, so that every function has an IOMMU group
 * and vfio-pci can bind it. It translates for nobody, since the cards do no
 * DMA, but keeps what it is told: vfio asks for it back.
 *
 * A module of its own, without a symbol of the card's: each function pins the
 * IOMMU's module, and the card's must stay removable. It knows the cards by
 * their vendor-specific capability.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/iommu.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/xarray.h>
#include "vsec.h"

struct snic_domain {
	struct iommu_domain domain;
	struct xarray pages;		/* I/O page number -> page number */
};

static struct snic_domain *to_snic(struct iommu_domain *domain)
{
	return container_of(domain, struct snic_domain, domain);
}

static int attach_dev(struct iommu_domain *domain, struct device *dev)
{
	return 0;
}

static int map_pages(struct iommu_domain *domain, unsigned long iova, phys_addr_t pa,
		     size_t size, size_t count, int prot, gfp_t gfp, size_t *mapped)
{
	size_t i;

	for (i = 0; i < count; i++, iova += size, pa += size) {
		void *old = xa_store(&to_snic(domain)->pages, iova >> PAGE_SHIFT,
				     xa_mk_value(pa >> PAGE_SHIFT), gfp);

		if (xa_is_err(old))
			return xa_err(old);
		*mapped += size;
	}
	return 0;
}

static size_t unmap_pages(struct iommu_domain *domain, unsigned long iova, size_t size,
			  size_t count, struct iommu_iotlb_gather *gather)
{
	size_t i;

	for (i = 0; i < count; i++)
		xa_erase(&to_snic(domain)->pages, (iova >> PAGE_SHIFT) + i);
	return count * size;
}

static phys_addr_t iova_to_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	void *page = xa_load(&to_snic(domain)->pages, iova >> PAGE_SHIFT);

	return page ? (phys_addr_t)xa_to_value(page) << PAGE_SHIFT |
		      offset_in_page(iova) : 0;
}

static void free_domain(struct iommu_domain *domain)
{
	xa_destroy(&to_snic(domain)->pages);
	kfree(to_snic(domain));
}

static const struct iommu_domain_ops paging_ops = {
	.attach_dev = attach_dev,
	.map_pages = map_pages,
	.unmap_pages = unmap_pages,
	.iova_to_phys = iova_to_phys,
	.free = free_domain,
};

static struct iommu_domain *alloc_paging(struct device *dev)
{
	struct snic_domain *domain = kzalloc(sizeof(*domain), GFP_KERNEL);

	if (!domain)
		return NULL;
	xa_init(&domain->pages);
	domain->domain.geometry.aperture_end = DMA_BIT_MASK(48);
	domain->domain.geometry.force_aperture = true;
	return &domain->domain;
}

static const struct iommu_domain_ops static_ops = {
	.attach_dev = attach_dev,
};

static struct iommu_domain identity_domain = {
	.type = IOMMU_DOMAIN_IDENTITY,
	.ops = &static_ops,
};

static struct iommu_domain blocked_domain = {
	.type = IOMMU_DOMAIN_BLOCKED,
	.ops = &static_ops,
};

static struct iommu_device snic_iommu;

static bool is_emulated(struct pci_dev *pdev)
{
	pdev = pci_physfn(pdev);
	return pci_find_vsec_capability(pdev, pdev->vendor, SNIC_VSEC_ID);
}

static struct iommu_device *probe_device(struct device *dev)
{
	if (!dev_is_pci(dev) || !is_emulated(to_pci_dev(dev)))
		return ERR_PTR(-ENODEV);
	return &snic_iommu;
}

/* vfio refuses an IOMMU whose DMA might not be coherent with the caches. */
static bool iommu_can(struct device *dev, enum iommu_cap cap)
{
	return cap == IOMMU_CAP_CACHE_COHERENCY;
}

static int default_domain_type(struct device *dev)
{
	return IOMMU_DOMAIN_IDENTITY;
}

static const struct iommu_ops snic_iommu_ops = {
	.capable = iommu_can,
	.probe_device = probe_device,
	.device_group = generic_device_group,
	.def_domain_type = default_domain_type,
	.identity_domain = &identity_domain,
	.blocked_domain = &blocked_domain,
	.domain_alloc_paging = alloc_paging,
	.default_domain_ops = &paging_ops,
	.pgsize_bitmap = PAGE_SIZE,
	.owner = THIS_MODULE,
};

static int __init snic_iommu_init(void)
{
	struct pci_dev *pdev = NULL;
	int err;

	/*
	 * The kernel notes the driver of a group's device when it is bound: a
	 * device that is bound already must not get its group afterwards.
	 */
	for_each_pci_dev(pdev) {
		if (is_emulated(pdev)) {
			pr_err("load this module before the cards: %s is there\n",
			       pci_name(pdev));
			pci_dev_put(pdev);
			return -EBUSY;
		}
	}
	err = iommu_device_sysfs_add(&snic_iommu, NULL, NULL, "sluicenic-iommu");
	if (err)
		return err;
	err = iommu_device_register(&snic_iommu, &snic_iommu_ops, NULL);
	if (err)
		iommu_device_sysfs_remove(&snic_iommu);
	return err;
}

static void __exit snic_iommu_exit(void)
{
	iommu_device_unregister(&snic_iommu);
	iommu_device_sysfs_remove(&snic_iommu);
}

module_init(snic_iommu_init);
module_exit(snic_iommu_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("IOMMU groups for the emulated SR-IOV network card");
