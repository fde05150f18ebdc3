// podtool: the small programs that the cluster needs, standard library only, one static
// binary. Like hyperkube it dispatches on its name or its first argument:
//
//	pause                  what keeps a Pod's sandbox: sleeps, reaps, ends on TERM
//	web                    a tiny HTTP server for tests (see web.go)
//	mkimage                binary + config -> an OCI image tar (see mkimage.go)
//	forward                stream forwarder between tcp: and unix: addresses
//	get                    an HTTP GET, for images that have no shell
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

var applets = map[string]func([]string) error{
	"pause": pause, "web": web, "mkimage": mkimage, "forward": forward, "get": get,
}

func main() {
	args := os.Args
	run, ok := applets[filepath.Base(args[0])]
	if !ok && len(args) > 1 {
		args = args[1:]
		run, ok = applets[filepath.Base(args[0])]
	}
	if !ok {
		fmt.Fprintln(os.Stderr, "usage: podtool pause|web|mkimage|forward|get ARGS...")
		os.Exit(2)
	}
	if err := run(args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, args[0]+":", err)
		os.Exit(1)
	}
}

// pause is process 1 of a sandbox.
func pause([]string) error {
	sig := make(chan os.Signal, 8)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for s := range sig {
		if s != syscall.SIGCHLD {
			return nil
		}
		for { // reap what a shared PID namespace leaves to us
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

func split(addr string) (string, string) {
	n, a, _ := strings.Cut(addr, ":")
	return n, a
}

// forward LISTEN TARGET, each tcp:HOST:PORT or unix:PATH. Two of them, one in
// the cluster's network namespace (unix -> tcp) and one outside (tcp on
// loopback -> unix), let a test outside reach the API server while no packet
// and no route joins the two namespaces: a unix socket in the file system
// does not care about network namespaces.
func forward(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: forward LISTEN TARGET")
	}
	n, a := split(args[0])
	if n == "unix" {
		os.Remove(a)
	}
	l, err := net.Listen(n, a)
	if err != nil {
		return err
	}
	if n == "unix" {
		os.Chmod(a, 0o600)
	}
	tn, ta := split(args[1])
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			d, err := net.Dial(tn, ta)
			if err != nil {
				return
			}
			defer d.Close()
			go func() {
				io.Copy(d, c)
				if w, ok := d.(interface{ CloseWrite() error }); ok {
					w.CloseWrite()
				}
			}()
			io.Copy(c, d)
		}()
	}
}

// get [-t SECONDS] [-n COUNT] URL: prints the bodies; fails on anything but 200.
func get(args []string) error {
	fs := flag.NewFlagSet("get", flag.ContinueOnError)
	t := fs.Float64("t", 3, "seconds for one request")
	n := fs.Int("n", 1, "how many requests, each on a connection of its own")
	if err := fs.Parse(args); err != nil {
		return err
	}
	c := http.Client{Timeout: time.Duration(*t * float64(time.Second)),
		Transport: &http.Transport{DisableKeepAlives: true}}
	for i := 0; i < *n; i++ {
		r, err := c.Get(fs.Arg(0))
		if err != nil {
			return err
		}
		io.Copy(os.Stdout, r.Body)
		r.Body.Close()
		if r.StatusCode != 200 {
			return errors.New(r.Status)
		}
	}
	return nil
}
