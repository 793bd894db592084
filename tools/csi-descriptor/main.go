// Print the official descriptor of the Container Storage Interface as a serialized
// google.protobuf.FileDescriptorProto, base64-encoded, on standard output.
//
// The descriptor is the one that the specification's own Go module carries, so nothing is parsed and
// nothing of the specification is stored here. tools/check_csi_proto.py runs this program, once with
// go.mod (the version that csi-vduse speaks) and once with previous.mod (the version before it).
package main

import (
	"encoding/base64"
	"fmt"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
)

func main() {
	file := protodesc.ToFileDescriptorProto(csi.File_csi_proto)
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(file)
	if err != nil {
		fmt.Fprintln(os.Stderr, "csi-descriptor:", err)
		os.Exit(1)
	}
	fmt.Println(base64.StdEncoding.EncodeToString(encoded))
}
