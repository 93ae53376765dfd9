package cluster

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"
)

func archive(t *testing.T, headers ...tar.Header) io.Reader {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		content := []byte("content of " + h.Name)
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(content))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &out
}

func TestFilesOfTheBaseSystemAreFoundBehindLinks(t *testing.T) {
	s, err := readSystem(archive(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "./usr/"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "./lib64", Linkname: "usr/lib64"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "./usr/lib64/ld.so", Linkname: "../lib/x86_64-linux-gnu/ld.so.2"},
		tar.Header{Typeflag: tar.TypeReg, Name: "./usr/lib/x86_64-linux-gnu/ld.so.2"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "./usr/bin/awk", Linkname: "/etc/alternatives/awk"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "./etc/alternatives/awk", Linkname: "/usr/bin/mawk"},
		tar.Header{Typeflag: tar.TypeReg, Name: "./usr/bin/mawk"},
		tar.Header{Typeflag: tar.TypeLink, Name: "./usr/bin/mawk2", Linkname: "./usr/bin/mawk"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "./usr/bin/circle", Linkname: "circle"},
	))
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"lib64/ld.so":    "content of ./usr/lib/x86_64-linux-gnu/ld.so.2",
		"usr/bin/awk":    "content of ./usr/bin/mawk",
		"usr/bin/mawk2":  "content of ./usr/bin/mawk",
		"usr/bin/circle": "",
		"usr/bin/none":   "",
	} {
		if got := string(s.read(file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if at, _, err := s.find("awk"); err != nil || at != "usr/bin/awk" {
		t.Errorf("find awk: %s, %v", at, err)
	}
	if _, _, err := s.find("emacs"); err == nil {
		t.Error("a program that is not there is found")
	}
}

func TestLayerHasParentsBeforeChildrenAndIsReproducible(t *testing.T) {
	files := layerFiles{"usr/bin/ip": []byte("ip"), "etc/passwd": []byte("root"), "bin/busybox": []byte("busybox")}
	links := map[string]string{"bin/sh": "busybox"}
	first, err := files.tar(links)
	if err != nil {
		t.Fatal(err)
	}
	second, err := files.tar(links)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("two layers of the same files differ (%v)", err)
	}
	seen := map[string]*tar.Header{}
	for in := tar.NewReader(bytes.NewReader(first)); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[h.Name] = h
		if h.Name == "usr/bin/" && seen["usr/"] == nil {
			t.Error("usr/bin comes before usr")
		}
	}
	for name, mode := range map[string]int64{"usr/bin/ip": 0o755, "etc/passwd": 0o644, "tmp/": 0o1777} {
		if h := seen[name]; h == nil || h.Mode != mode {
			t.Errorf("%s: %+v, want mode %o", name, h, mode)
		}
	}
	if h := seen["bin/sh"]; h == nil || h.Linkname != "busybox" {
		t.Errorf("bin/sh: %+v", h)
	}
}
