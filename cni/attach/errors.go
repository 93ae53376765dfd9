package attach

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
)

// The error codes of this plugin; codes below 100 are those of the CNI
// specification.
const (
	CodeHeld        = 100 // the VF or slot belongs to another live attachment, or pod
	CodeUnusable    = 101 // the VF has no driver, or its netdev is not in the host's namespace; the parent is missing or down
	CodeNameTaken   = 102 // the interface name, or a name of the VF, exists in the pod already
	CodeKernel      = 103 // the kernel or the driver refused a change
	CodeIPAM        = 104 // the IPAM plugin failed; its own message is in the error
	CodeCheckFailed = 105 // CHECK found the attachment missing or changed
	CodeNotUndone   = 106 // something failed and could not be undone entirely; DEL will try again
	CodeConflict    = 107 // another station has the address; its MAC is in the error
	CodePolicy      = 108 // a network policy selects the pod and cannot be enforced on the interface
)

// fail makes an error with a CNI error code.
func fail(code uint, format string, args ...any) error {
	return &codedError{code, fmt.Errorf(format, args...)}
}

// WithCode gives an error a CNI error code, unless it has one.
func WithCode(code uint, err error) error {
	if errors.As(err, new(*codedError)) {
		return err
	}
	return &codedError{code, err}
}

// refused gives an error of the kernel its code, unless it has a better one.
func refused(format string, err error) error {
	wrapped := fmt.Errorf(format, err)
	if errors.As(err, new(*codedError)) {
		return wrapped
	}
	return &codedError{CodeKernel, wrapped}
}

type codedError struct {
	code uint
	err  error
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

// CNIError turns any error into the form of the CNI specification.
func CNIError(err error) *types.Error {
	var coded *codedError
	if errors.As(err, &coded) {
		return types.NewError(coded.code, err.Error(), "")
	}
	var cni *types.Error
	if errors.As(err, &cni) {
		return types.NewError(cni.Code, err.Error(), "")
	}
	return types.NewError(types.ErrInternal, err.Error(), "")
}
