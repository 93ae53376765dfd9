package host

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
)

// RestoreVFs gives a PF that has no VFs the number of VFs and the automatic
// probing (sriov_drivers_autoprobe) that it had before anybody managed it. The
// kernel binds the VFs as that says.
func (h *Host) RestoreVFs(ctx context.Context, pciAddress string, n int, autoprobe bool) error {
	device, err := h.device(pciAddress)
	if err != nil {
		return err
	}
	if err = ctx.Err(); err != nil {
		return err
	}
	err = setAutoprobe(device, autoprobe)
	if err == nil && n > 0 {
		err = writeSysfs(filepath.Join(device, "sriov_numvfs"), strconv.Itoa(n))
	}
	if err != nil {
		return &KernelError{Op: fmt.Sprintf("restore %d VFs", n), Object: pciAddress, Err: pathless(err), Hint: hintFor(err, numVFsHints)}
	}
	return nil
}
