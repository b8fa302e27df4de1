//go:build tools

// Package tools names the kube-apiserver that the tests run against, as a dependency: no line of it is copied here.
//
// k8s.io/kubernetes replaces its staging modules by relative paths, which hold only inside its own tree, so go.mod
// repeats each of them with the release of the same number.
package tools

import _ "k8s.io/kubernetes/cmd/kube-apiserver"
