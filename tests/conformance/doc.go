// Package conformance drives a real hsmd with kube-apiserver's own client code: the gRPC service and the envelope
// transformer of k8s.io/apiserver, its loader of EncryptionConfiguration files with their health checks and write lease,
// and the messages of k8s.io/kms.
//
//	go test ./...                                            against the client of Kubernetes 1.37
//	go test -modfile=go134.mod -tags=kube134 ./...           against the client of Kubernetes 1.34
//
// HSMD names the daemon's binary; without it, the release build in target/dist is taken.
//
// The tests need root, softhsm2-util and pkcs11-tool. hsmd serves nobody but kube-apiserver, and has no switch that would
// make an exception for tests. So TestMain splits: the process that `go test` started stays root and keeps tokens and
// daemons (keeper_test.go); the tests run in a second process that looks like kube-apiserver on a node, with its uid, in
// a static pod's cgroup and with that pod's log folder.
package conformance
