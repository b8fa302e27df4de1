//go:build tools

// Package tools names the etcd server that the tests run against, as a dependency: no line of it is copied here.
package tools

import _ "go.etcd.io/etcd/server/v3"
