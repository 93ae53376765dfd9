/* SPDX-License-Identifier: GPL-2.0 */
#ifndef SLUICENIC_VSEC_H
#define SLUICENIC_VSEC_H

/* Id of the PF's vendor-specific capability, by which an emulated card is known. */
#define SNIC_VSEC_ID	0x534e

#endif
