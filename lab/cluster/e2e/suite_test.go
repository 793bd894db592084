// The storage tests of Kubernetes (test/e2e/storage/external) as a program of our own: `go test -c`. What upstream's
// e2e.test has besides is left out; flags are the same.
package e2e

import (
	"flag"
	"os"
	"testing"

	"k8s.io/kubernetes/test/e2e"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"

	_ "k8s.io/kubernetes/test/e2e/feature"                // the names of features
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"   // what is dumped of a failed spec's namespace
	_ "k8s.io/kubernetes/test/e2e/framework/metrics/init" // flags of the framework
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"    // the check that nodes are Ready
	_ "k8s.io/kubernetes/test/e2e/storage/external"       // -storage.testdriver
	_ "k8s.io/kubernetes/test/utils/format"               // objects in messages as YAML
)

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	framework.AfterReadingAllFlags(&framework.TestContext)
	// The classes that the driver's description names are files beside it.
	testfiles.AddFileSource(testfiles.RootFileSource{Root: framework.TestContext.RepoRoot})
	os.Exit(m.Run())
}

func TestStorage(t *testing.T) {
	e2e.RunE2ETests(t)
}
