package cluster

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

//go:embed multus.yaml
var multusManifest []byte

// collections are where objects of a kind are created.
var collections = map[string]string{
	"CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
	"ClusterRole":              "/apis/rbac.authorization.k8s.io/v1/clusterroles",
	"ClusterRoleBinding":       "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}

// InstallMultus creates the objects that Multus on the nodes needs.
func (c ControlPlane) InstallMultus(ctx context.Context) error {
	client, err := c.Client()
	if err != nil {
		return err
	}
	objects, err := split(multusManifest)
	if err != nil {
		return err
	}
	for _, o := range objects {
		if err := client.RESTClient().Post().AbsPath(collections[o.kind]).SetHeader("Content-Type", "application/json").Body(o.json).Do(ctx).Error(); err != nil {
			return fmt.Errorf("create %s %s: %w", o.kind, o.name, err)
		}
	}
	return nil
}

type object struct {
	kind, name string
	json       []byte
}

// split takes a manifest apart into its objects, whose kinds must be among collections.
func split(manifest []byte) ([]object, error) {
	var objects []object
	for documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest))); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("split a manifest: %w", err)
		}
		var head struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err = yaml.Unmarshal(document, &head); err != nil {
			return nil, fmt.Errorf("read a manifest: %w", err)
		}
		if collections[head.Kind] == "" {
			return nil, fmt.Errorf("read a manifest: kind %q of %q is not among those that can be created", head.Kind, head.Metadata.Name)
		}
		json, err := yaml.YAMLToJSON(document)
		if err != nil {
			return nil, fmt.Errorf("convert %s %s: %w", head.Kind, head.Metadata.Name, err)
		}
		objects = append(objects, object{head.Kind, head.Metadata.Name, json})
	}
}
