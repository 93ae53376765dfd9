// SPDX-License-Identifier: GPL-2.0
/*
 * vDPA: in switchdev mode a VF can have a vDPA device, a virtio NIC that a driver of
 * the vdpa bus hands to the kernel or to user space. It has a configuration and
 * queues that can be set up, and moves no frame.
 */
#include <linux/vdpa.h>
#include <uapi/linux/vdpa.h>
#include <uapi/linux/virtio_config.h>
#include <uapi/linux/virtio_ids.h>
#include <uapi/linux/virtio_net.h>
#include "sluicenic.h"

#define QUEUES	16	/* 8 pairs */

struct snic_vdpa {
	struct vdpa_device vdpa;
	struct virtio_net_config config;
	struct vdpa_vq_state state[QUEUES];
	DECLARE_BITMAP(ready, QUEUES);
	u64 features;
	u8 status;
};

/* What makes vDPA devices of one VF: one. */
struct snic_vdpa_mgmt {
	struct vdpa_mgmt_dev mgmt;
	struct snic_port *port;
	struct vdpa_device *dev;
};

static struct snic_vdpa *to_snic(struct vdpa_device *dev)
{
	return container_of(dev, struct snic_vdpa, vdpa);
}

static int set_vq_address(struct vdpa_device *dev, u16 idx, u64 desc, u64 driver, u64 device)
{
	return 0;
}

static void set_vq_num(struct vdpa_device *dev, u16 idx, u32 num)
{
}

static void kick_vq(struct vdpa_device *dev, u16 idx)
{
}

static void set_vq_cb(struct vdpa_device *dev, u16 idx, struct vdpa_callback *cb)
{
}

static void set_vq_ready(struct vdpa_device *dev, u16 idx, bool ready)
{
	assign_bit(idx, to_snic(dev)->ready, ready);
}

static bool get_vq_ready(struct vdpa_device *dev, u16 idx)
{
	return test_bit(idx, to_snic(dev)->ready);
}

static int set_vq_state(struct vdpa_device *dev, u16 idx, const struct vdpa_vq_state *state)
{
	to_snic(dev)->state[idx] = *state;
	return 0;
}

static int get_vq_state(struct vdpa_device *dev, u16 idx, struct vdpa_vq_state *state)
{
	*state = to_snic(dev)->state[idx];
	return 0;
}

static u32 get_vq_align(struct vdpa_device *dev)
{
	return PAGE_SIZE;
}

static u64 get_device_features(struct vdpa_device *dev)
{
	return BIT_ULL(VIRTIO_F_VERSION_1) | BIT_ULL(VIRTIO_F_ACCESS_PLATFORM) |
	       BIT_ULL(VIRTIO_NET_F_MAC) | BIT_ULL(VIRTIO_NET_F_STATUS);
}

static int set_driver_features(struct vdpa_device *dev, u64 features)
{
	to_snic(dev)->features = features & get_device_features(dev);
	return 0;
}

static u64 get_driver_features(struct vdpa_device *dev)
{
	return to_snic(dev)->features;
}

static void set_config_cb(struct vdpa_device *dev, struct vdpa_callback *cb)
{
}

static u16 get_vq_num_max(struct vdpa_device *dev)
{
	return 256;
}

static u32 get_device_id(struct vdpa_device *dev)
{
	return VIRTIO_ID_NET;
}

static u32 get_vendor_id(struct vdpa_device *dev)
{
	return to_pci_dev(dev->dma_dev)->vendor;
}

static u8 get_status(struct vdpa_device *dev)
{
	return to_snic(dev)->status;
}

static void set_status(struct vdpa_device *dev, u8 status)
{
	to_snic(dev)->status = status;
}

static int reset(struct vdpa_device *dev)
{
	struct snic_vdpa *v = to_snic(dev);

	v->status = 0;
	v->features = 0;
	bitmap_zero(v->ready, QUEUES);
	memset(v->state, 0, sizeof(v->state));
	return 0;
}

static size_t get_config_size(struct vdpa_device *dev)
{
	return sizeof(struct virtio_net_config);
}

static void get_config(struct vdpa_device *dev, unsigned int off, void *buf, unsigned int len)
{
	struct snic_vdpa *v = to_snic(dev);

	if (off + len <= sizeof(v->config))
		memcpy(buf, (u8 *)&v->config + off, len);
}

static void set_config(struct vdpa_device *dev, unsigned int off, const void *buf,
		       unsigned int len)
{
}

/* Nothing is ever read or written by the device, so it may see anything. */
static int set_map(struct vdpa_device *dev, unsigned int asid, struct vhost_iotlb *iotlb)
{
	return 0;
}

static const struct vdpa_config_ops config_ops = {
	.set_vq_address = set_vq_address,
	.set_vq_num = set_vq_num,
	.kick_vq = kick_vq,
	.set_vq_cb = set_vq_cb,
	.set_vq_ready = set_vq_ready,
	.get_vq_ready = get_vq_ready,
	.set_vq_state = set_vq_state,
	.get_vq_state = get_vq_state,
	.get_vq_align = get_vq_align,
	.get_device_features = get_device_features,
	.set_driver_features = set_driver_features,
	.get_driver_features = get_driver_features,
	.set_config_cb = set_config_cb,
	.get_vq_num_max = get_vq_num_max,
	.get_device_id = get_device_id,
	.get_vendor_id = get_vendor_id,
	.get_status = get_status,
	.set_status = set_status,
	.reset = reset,
	.get_config_size = get_config_size,
	.get_config = get_config,
	.set_config = set_config,
	.set_map = set_map,
};

static int dev_add(struct vdpa_mgmt_dev *mgmt, const char *name,
		   const struct vdpa_dev_set_config *config)
{
	struct snic_vdpa_mgmt *m = container_of(mgmt, struct snic_vdpa_mgmt, mgmt);
	unsigned int queues = 2;
	struct snic_vdpa *v;
	int err;

	/* Both as mlx5 answers. */
	if (m->dev)
		return -ENOSPC;
	if (config->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MAX_VQP)) {
		if (config->net.max_vq_pairs > QUEUES / 2)
			return -EINVAL;
		queues = 2 * config->net.max_vq_pairs;
	}
	v = vdpa_alloc_device(struct snic_vdpa, vdpa, mgmt->device, &config_ops, 1, 1, name,
			      false);
	if (IS_ERR(v))
		return PTR_ERR(v);
	v->vdpa.dma_dev = mgmt->device;
	v->vdpa.mdev = mgmt;
	u64_to_ether_addr(READ_ONCE(m->port->mac), v->config.mac);
	v->config.status = cpu_to_le16(VIRTIO_NET_S_LINK_UP);
	err = _vdpa_register_device(&v->vdpa, queues);
	if (err) {
		put_device(&v->vdpa.dev);
		return err;
	}
	m->dev = &v->vdpa;
	return 0;
}

static void dev_del(struct vdpa_mgmt_dev *mgmt, struct vdpa_device *dev)
{
	container_of(mgmt, struct snic_vdpa_mgmt, mgmt)->dev = NULL;
	_vdpa_unregister_device(dev);
}

static const struct vdpa_mgmtdev_ops mgmt_ops = {
	.dev_add = dev_add,
	.dev_del = dev_del,
};

static struct virtio_device_id ids[] = {
	{ VIRTIO_ID_NET, VIRTIO_DEV_ANY_ID },
	{},
};

int snic_vdpa_add(struct snic_port *port, struct pci_dev *pdev)
{
	struct snic_vdpa_mgmt *m = kzalloc(sizeof(*m), GFP_KERNEL);
	int err;

	if (!m)
		return -ENOMEM;
	m->port = port;
	m->mgmt = (struct vdpa_mgmt_dev) {
		.device = &pdev->dev,
		.ops = &mgmt_ops,
		.id_table = ids,
		.config_attr_mask = BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MAX_VQP),
		.max_supported_vqs = QUEUES,
	};
	err = vdpa_mgmtdev_register(&m->mgmt);
	if (err)
		kfree(m);
	else
		port->vdpa = m;
	return err;
}

void snic_vdpa_remove(struct snic_port *port)
{
	if (!port->vdpa)
		return;
	vdpa_mgmtdev_unregister(&port->vdpa->mgmt);	/* removes the device, too */
	kfree(port->vdpa);
	port->vdpa = NULL;
}
