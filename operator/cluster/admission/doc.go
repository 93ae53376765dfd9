// Package admission is the operator's webhooks.
//
// The validating one refuses what the schemas cannot, because it takes more than one
// object to see that it is wrong, and warns of what is allowed and helps nobody. It
// decides by the functions that the controllers act by (plan.Cluster, render.Network), so
// that nothing is refused here that would work, and nothing that is let through, for want
// of the webhook, does harm: the controllers refuse it again, in its own status. That is
// why its failure policy is Ignore, and why it is off unless the SriovOperatorConfig turns
// it on.
//
// The mutating one gives pods what their networks need (package inject).
//
//   - Validator and Injector answer requests, on every replica.
//   - Server serves them with a certificate that is mounted, or else kept in a Secret.
//   - Configuration, on the working replica, keeps that Secret and the webhook
//     configurations.
package admission
