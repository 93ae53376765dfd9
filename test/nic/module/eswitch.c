// SPDX-License-Identifier: GPL-2.0
/* devlink: what the card is, and the mode of its embedded switch. */
#include "sluicenic.h"

static int info_get(struct devlink *devlink, struct devlink_info_req *req,
		    struct netlink_ext_ack *extack)
{
	struct snic_pf *pf = devlink_priv(devlink);
	int err;

	err = devlink_info_serial_number_put(req, pf->card->serial);
	if (err)
		return err;
	err = devlink_info_version_fixed_put(req, DEVLINK_INFO_VERSION_GENERIC_BOARD_ID,
					     SNIC_PF_DRIVER);
	if (err)
		return err;
	return devlink_info_version_running_put(req, DEVLINK_INFO_VERSION_GENERIC_FW,
						SNIC_VERSION);
}

static int mode_get(struct devlink *devlink, u16 *mode)
{
	struct snic_pf *pf = devlink_priv(devlink);

	*mode = pf->eswitch_mode;
	return 0;
}

/* Has any VF of the PF a driver, be it ours or vfio? */
static bool vfs_bound(struct snic_pf *pf)
{
	struct pci_dev *vf = NULL;

	while ((vf = pci_get_device(pf->card->vendor, pf->card->vf_device, vf))) {
		if (vf->is_virtfn && pci_physfn(vf) == pf->pdev && vf->driver) {
			pci_dev_put(vf);
			return true;
		}
	}
	return false;
}

static int mode_set(struct devlink *devlink, u16 mode, struct netlink_ext_ack *extack)
{
	struct snic_pf *pf = devlink_priv(devlink);
	int err;

	if (mode == pf->eswitch_mode)
		return 0;
	if (!strcmp(snic_pf_driver.name, "ice") && pf->num_vfs) {
		NL_SET_ERR_MSG_MOD(extack, "the mode changes only while there are no VFs");
		return -EOPNOTSUPP;
	}
	if (vfs_bound(pf)) {
		NL_SET_ERR_MSG_MOD(extack, "a VF is bound to a driver: unbind all VFs first");
		return -EBUSY;
	}
	err = snic_fault(pf->card, SNIC_FAULT_ESWITCH_MODE);
	if (err) {
		NL_SET_ERR_MSG_MOD(extack, "the mode change fails because a test wants it");
		return err;
	}
	if (mode == DEVLINK_ESWITCH_MODE_SWITCHDEV) {
		err = snic_reps_add(pf);
		if (err)
			return err;
	} else {
		snic_reps_remove(pf);
	}
	rtnl_lock();
	WRITE_ONCE(pf->eswitch_mode, mode);
	snic_link_update(pf->card);
	rtnl_unlock();
	return 0;
}

/* What uplink and representors show as that of their switch. */
void snic_switch_id(const struct snic_card *card, struct netdev_phys_item_id *id)
{
	id->id_len = ETH_ALEN;
	memcpy(id->id, card->mac, ETH_ALEN);
}

const struct devlink_ops snic_devlink_ops = {
	.info_get = info_get,
	.eswitch_mode_get = mode_get,
	.eswitch_mode_set = mode_set,
};
