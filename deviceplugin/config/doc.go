// Package config reads config.json of the SR-IOV network device plugin and chooses the
// VFs that it asks for.
//
// The keys are that project's, and what they select is the same, with these
// differences, each because the other way has put NICs into pools for which they were
// not meant:
//
//   - what is wrong anywhere refuses the whole file, with the path of the key: an unknown or
//     repeated key, a value of another type, a malformed range of VFs;
//   - a selector without filters must say "selectAll": true;
//   - VFs only: a PF is no device, and deviceType accelerator or auxNetDevice, and the
//     selectors ddpProfiles, pKeys, acpiIndexes and auxTypes, are refused by name;
//   - isRdma, needVhostNet and vdpaType are the same in all selectors of a resource.
//
// A resource may also have "allocation" and "requireCarrier", as a policy.
//
// A VF goes to the first resource of the list that selects it, unless a policy has it.
package config
