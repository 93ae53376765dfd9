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
	*mode = DEVLINK_ESWITCH_MODE_LEGACY;
	return 0;
}

static int mode_set(struct devlink *devlink, u16 mode, struct netlink_ext_ack *extack)
{
	if (mode == DEVLINK_ESWITCH_MODE_LEGACY)
		return 0;
	NL_SET_ERR_MSG_MOD(extack, "the embedded switch has legacy mode only");
	return -EOPNOTSUPP;
}

const struct devlink_ops snic_devlink_ops = {
	.info_get = info_get,
	.eswitch_mode_get = mode_get,
	.eswitch_mode_set = mode_set,
};
