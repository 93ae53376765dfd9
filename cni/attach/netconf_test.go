package attach

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/host"
)

func TestParseTakesWhatPeopleHave(t *testing.T) {
	for name, conf := range map[string]string{
		"rendered from a SriovNetwork": `{"cniVersion":"1.0.0","name":"n","type":"sriov","vlan":0,"vlanQoS":0,"spoofchk":"on","trust":"off","link_state":"auto",
			"min_tx_rate":0,"max_tx_rate":100,"capabilities":{"mac":true,"ips":true},"logLevel":"info","logFile":"/var/log/x","ipam":{},"deviceID":"0000:01:10.0"}`,
		"passed on by Multus": `{"cniVersion":"0.3.1","name":"n","type":"sriov","deviceID":"0000:01:10.0","pciBusID":"0000:01:10.0",
			"runtimeConfig":{"deviceID":"0000:01:10.0","CNIDeviceInfoFile":"/x","mac":"02:00:00:00:00:05","ips":["10.0.0.1/24"],"infinibandGUID":"","bandwidth":null,"portMappings":[]},
			"args":{"cni":{"foo":"bar"},"labels":[{"key":"a","value":"b"}]},"dns":{"nameservers":["10.0.0.1"]}}`,
		"double tagged":     `{"cniVersion":"1.1.0","name":"n","type":"sriov","vlan":7,"vlanQoS":7,"vlanProto":"802.1AD","deviceID":"10000:01:10.0"}`,
		"empty and absent":  `{"cniVersion":"1.1.0","name":"n","type":"sriov","vlan":null,"spoofchk":"","link_state":"","mac":"","deviceID":"0000:01:10.0"}`,
		"escaped but equal": `{"cniVersion":"1.1.0","name":"n","type":"sriov","spoofchk":"\u006fn","deviceID":"0000:01:10.0"}`,
	} {
		cfg, err := Parse(Request{Command: Add, ContainerID: "c", Netns: "/x", IfName: "net1", Stdin: []byte(conf)})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if name == "escaped but equal" && (cfg.SpoofChk == nil || !*cfg.SpoofChk) {
			t.Errorf("%s: spoofchk is %v", name, cfg.SpoofChk)
		}
		if name == "empty and absent" {
			b := Baseline{MAC: mac0}
			if s, asked := cfg.Settings(b); asked != 0 || host.DiffVFSettings(s, b.Settings()) != nil {
				t.Errorf("%s: asks for %b %+v", name, asked, s)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct {
		keys string
		code uint
		says string
	}{
		{`"vlan":5000`, 7, `network "blue": vlan 5000 is not in the range 0-4094`},
		{`"vlan":-1`, 7, `vlan -1`},
		{`"vlan":"100"`, 7, `vlan "100" is not a whole number`},
		{`"vlan":1.5`, 7, `vlan 1.5 is not a whole number`},
		{`"vlanQoS":3`, 7, `vlanQoS 3 is set and vlan is not`},
		{`"vlan":5,"vlanQoS":8`, 7, `vlanQoS 8 is not in the range 0-7`},
		{`"vlan":0,"vlanQoS":1`, 7, `vlanQoS 1 needs a vlan other than 0`},
		{`"vlanProto":"802.1q"`, 7, `vlanProto "802.1q" is set and vlan is not`},
		{`"vlan":5,"vlanProto":"802.1x"`, 7, `vlanProto "802.1x" is not "802.1q" or "802.1ad"`},
		{`"vlan":0,"vlanProto":"802.1ad"`, 7, `vlanProto "802.1ad" needs a vlan`},
		{`"spoofchk":"ON"`, 7, `spoofchk "ON" is not one of "on", "off"`},
		{`"trust":"yes"`, 7, `trust "yes" is not one of`},
		{`"trust":true`, 7, `trust true is not one of`},
		{`"link_state":"up"`, 7, `link_state "up" is not one of "auto", "enable", "disable"`},
		{`"min_tx_rate":200,"max_tx_rate":100`, 7, `min_tx_rate 200 is above max_tx_rate 100`},
		{`"max_tx_rate":-5`, 7, `max_tx_rate -5`},
		{`"mtu":40`, 7, `mtu 40 is not in the range`},
		{`"mac":"zz"`, 7, `mac "zz" is not a MAC address`},
		{`"mac":"01:00:5e:00:00:01"`, 7, `multicast`},
		{`"mac":"00:00:00:00:00:00"`, 7, `is no address`},
		{`"runtimeConfig":{"mac":"01:00:5e:00:00:01"}`, 7, `runtimeConfig.mac "01:00:5e:00:00:01"`},
		{`"runtimeConfig":{"macc":"x"}`, 7, `unknown key "runtimeConfig.macc" with value "x": did you mean "mac"?`},
		{`"logLevel":"loud"`, 7, `logLevel "loud"`},
		{`"promisc":"on"`, 7, `promisc "on" is a string where bool is needed`},
		{`"rdma":1`, 7, `rdma 1 is a number where bool is needed`},
		{`"runtimeConfig":{"infinibandGUID":"02:00:00:00:00:00:00:01"}`, 7, `set type to ib-sriov`},
		{`"vlna":100`, 7, `network "blue": unknown key "vlna" with value 100: did you mean "vlan"?`},
		{`"VLAN":100`, 7, `unknown key "VLAN" with value 100: did you mean "vlan"?`},
		{`"spoofCheck":"on"`, 7, `did you mean "spoofchk"?`},
		{`"origVfState":{"HostIFName":"x"}`, 7, `unknown key "origVfState"`},
		{`"vlan":1,"vlan":2`, 6, `has the key "vlan" twice`},
		{`"ipam":{"range":"x"}`, 7, `has no type`},
		{`"ipam":{"type":"../../sh"}`, 7, `no name of a plugin`},
		{`"prevResult":{"cniVersion":"1.0.0"}`, 7, `must be the first of its chain`},
		{`"deviceID":""`, 6, `twice`},
	} {
		_, err := Parse(request(Add, "c1", pod1, vf0, c.keys))
		if codeOf(err) != c.code || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: code %d, %v; want %d, %s", c.keys, codeOf(err), err, c.code, c.says)
		}
	}
	for stdin, want := range map[string]uint{
		``: 6, `[]`: 6, `{`: 6, `{} x`: 6, `{"name":"n"}`: 1, `{"name":"n","cniVersion":"9.0.0"}`: 1, `{"cniVersion":"1.0.0"}`: 7,
		`{"name":"n","cniVersion":"1.0.0"}`: 7,
	} {
		if _, err := Parse(Request{Command: Add, ContainerID: "c", IfName: "i", Netns: "/n", Stdin: []byte(stdin)}); codeOf(err) != want {
			t.Errorf("%s: code %d, %v; want %d", stdin, codeOf(err), err, want)
		}
	}
	for name, change := range map[string]func(*Request){
		"CNI_CONTAINERID is empty":   func(r *Request) { r.ContainerID = "" },
		`CNI_IFNAME "a/b" is not`:    func(r *Request) { r.IfName = "a/b" },
		`CNI_IFNAME "net%d" is not`:  func(r *Request) { r.IfName = "net%d" },
		`sixteen`:                    func(r *Request) { r.IfName = "sixteenletters16" },
		`CNI_NETNS is empty`:         func(r *Request) { r.Netns = "" },
		`the unknown key "MACC"`:     func(r *Request) { r.Args = "MACC=1" },
		`"x", which is not KEY=VALU`: func(r *Request) { r.Args = "x" },
	} {
		req := request(Add, "c1", pod1, vf0, "")
		change(&req)
		if _, err := Parse(req); codeOf(err) != 4 || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: code %d, %v", name, codeOf(err), err)
		}
	}
	status := request(Status, "", "", vf0, "")
	status.Stdin = []byte(strings.Replace(string(status.Stdin), "1.1.0", "1.0.0", 1))
	if _, err := Parse(status); codeOf(err) != 1 {
		t.Errorf("STATUS in version 1.0.0: %v", err)
	}
}

func TestMACPrecedence(t *testing.T) {
	const conf, args, runtime = `"mac":"02:00:00:00:00:01"`, "MAC=02:00:00:00:00:02", `"runtimeConfig":{"mac":"02:00:00:00:00:03"}`
	for _, c := range []struct{ keys, args, want string }{
		{"", "", ""},
		{conf, "", "02:00:00:00:00:01"},
		{conf, args, "02:00:00:00:00:02"},
		{conf + "," + runtime, args, "02:00:00:00:00:03"},
		{runtime, "", "02:00:00:00:00:03"},
	} {
		req := request(Add, "c1", pod1, vf0, c.keys)
		req.Args = c.args
		cfg, err := Parse(req)
		if err != nil || cfg.MAC.String() != c.want {
			t.Errorf("%s %s: %v, %v", c.keys, c.args, cfg, err)
		}
	}
}

// Every key that is not in the list is refused, whatever it is.
func TestUnknownKeysAreRefused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.String().Draw(t, "key")
		if _, known := fields[key]; known {
			t.Skip()
		}
		b, _ := json.Marshal(key)
		var same string
		if json.Unmarshal(b, &same) != nil || same != key {
			t.Skip() // not UTF-8
		}
		if _, err := Parse(request(Add, "c1", pod1, vf0, string(b)+":1")); codeOf(err) != 7 {
			t.Fatalf("%q: %v", key, err)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add("ADD", []byte(`{"cniVersion":"1.1.0","name":"n","type":"sriov","deviceID":"0000:01:10.0",`+full+`}`), "MAC=02:00:00:00:00:01", "net1")
	f.Add("ADD", []byte(`{"cniVersion":"0.3.1","name":"n","vlan":5000,"Vlan":1}`), "", "net1")
	f.Add("DEL", []byte(`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"mac":"02:00:00:00:00:01","ips":["10.0.0.1/24"]},"prevResult":{}}`), "IgnoreUnknown=1;X=y", "eth0")
	f.Add("GC", []byte(`{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"c","ifname":"i"}]}`), "", "")
	f.Fuzz(func(t *testing.T, command string, stdin []byte, args, ifName string) {
		cfg, err := Parse(Request{Command: Command(command), ContainerID: "c", Netns: "/n", IfName: ifName, Args: args, Stdin: stdin})
		var keys map[string]json.RawMessage
		notJSON := json.Unmarshal(stdin, &keys)
		if err != nil {
			switch code := codeOf(err); {
			case code != types.ErrIncompatibleCNIVersion && code != types.ErrInvalidEnvironmentVariables && code != types.ErrDecodingFailure && code != types.ErrInvalidNetworkConfig:
				t.Fatalf("code %d: %v", code, err)
			case code == types.ErrInvalidNetworkConfig && !strings.HasPrefix(err.Error(), "network "):
				t.Fatalf("names no network: %v", err)
			}
			return
		}
		if notJSON != nil {
			t.Fatalf("accepted what is no JSON: %v", notJSON)
		}
		for k := range keys {
			if _, known := fields[k]; !known {
				t.Fatalf("accepted the unknown key %q", k)
			}
		}
		var runtime map[string]json.RawMessage
		_ = json.Unmarshal(keys["runtimeConfig"], &runtime)
		for k := range runtime {
			if _, known := runtimeKeys[k]; !known {
				t.Fatalf("accepted the unknown key runtimeConfig.%q", k)
			}
		}
		if _, known := since[Command(command)]; !known || cfg.Network == "" || !slices.Contains(Versions, cfg.CNIVersion) ||
			cfg.DeviceID != "" && !host.ValidPCIAddress(cfg.DeviceID) || command == "ADD" && cfg.DeviceID == "" {
			t.Fatalf("accepted %s with %+v", command, cfg)
		}
		want, asked := cfg.Settings(Baseline{MAC: mac0})
		if want.VLAN < 0 || want.VLAN > 4094 || want.VLANQoS < 0 || want.VLANQoS > 7 || want.MinTxRate < 0 || want.MaxTxRate < 0 ||
			len(want.MAC) != 6 || want.MAC[0]&1 != 0 || cfg.MTU != 0 && (cfg.MTU < 68 || cfg.MTU > 65535) || strings.ContainsAny(cfg.IPAM, "/\x00") {
			t.Fatalf("accepted %+v, %+v", cfg, want)
		}
		// What was not asked for stays at baseline, however it was spelt.
		if asked&host.VFTrust == 0 && want.Trust || asked&host.VFSpoofChk == 0 && !want.SpoofChk {
			t.Fatalf("asks for %b and gets %+v", asked, want)
		}
	})
}

// What users look up is all there: each key of a VF's network and each code.
func TestDocumentation(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cni.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("errors.go")
	if err != nil {
		t.Fatal(err)
	}
	codes := regexp.MustCompile(`= (1\d\d) //`).FindAllStringSubmatch(string(source), -1)
	if len(codes) < 8 {
		t.Fatalf("%d codes in errors.go", len(codes))
	}
	for _, c := range codes {
		if !strings.Contains(string(doc), "\n| "+c[1]+" | ") {
			t.Errorf("code %s is not documented", c[1])
		}
	}
	for _, key := range vfKeys {
		if !strings.Contains(string(doc), "`"+key+"`") {
			t.Errorf("key %s is not documented", key)
		}
	}
}
