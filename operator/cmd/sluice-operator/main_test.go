package main

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	env := map[string]string{"POD_NAMESPACE": "ns", "RESOURCE_PREFIX": "example.com", "POD_NAME": "p"}
	s, err := parse([]string{"--metrics-bind-address=0"}, func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	if s.Namespace != "ns" || s.ResourcePrefix != "example.com" || s.metrics != "0" || s.probes != ":8081" || s.pod != "p" || !s.elect {
		t.Errorf("the settings are %+v", s)
	}
	if s, _ = parse([]string{"--webhook-annotation=a/b=c=d", "--webhook-annotation=e=f"}, func(k string) string { return env[k] }); s.WebhookAnnotations["a/b"] != "c=d" || s.WebhookAnnotations["e"] != "f" {
		t.Errorf("the annotations are %v", s.WebhookAnnotations)
	}
	delete(env, "RESOURCE_PREFIX")
	if s, _ = parse(nil, func(k string) string { return env[k] }); s.ResourcePrefix != "openshift.io" {
		t.Errorf("the default prefix is %q", s.ResourcePrefix)
	}
	for want, args := range map[string][]string{"--namespace is empty": {"--namespace="}, "--pod-name and --agent-image are empty": {"--pod-name="}, `unexpected argument "x"`: {"x"}, "write key=value": {"--webhook-annotation=x"}} {
		if _, err := parse(args, func(k string) string { return env[k] }); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v gives %v, want %q", args, err, want)
		}
	}
}
