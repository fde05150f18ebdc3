// netpol enforces networking.k8s.io/v1 NetworkPolicy on one node with nftables.
//
// It watches Pods, Namespaces and NetworkPolicies, and on every change writes
// one table anew, in one transaction, in the network namespace it runs in.
// Traffic that a node's own processes send to its Pods (kubelet's probes) does
// not pass the forward hook and is always let in, as the standard has it.
// Connections that stand already are not cut by a new policy. IPv4 only.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log"
	"os/exec"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

const table = "cadre-netpol"

type state struct {
	node     string
	pods     []*corev1.Pod
	nsLabels map[string]labels.Set
	policies []*netv1.NetworkPolicy
}

func selects(s *metav1.LabelSelector, l labels.Set) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(l)
}

func live(p *corev1.Pod) bool {
	return p.Status.PodIP != "" && !p.Spec.HostNetwork && !strings.Contains(p.Status.PodIP, ":") &&
		p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// podsOf: the Pods that a peer means, seen from a policy in namespace ns.
func (s *state) podsOf(ns string, peer netv1.NetworkPolicyPeer) []*corev1.Pod {
	var out []*corev1.Pod
	for _, p := range s.pods {
		if peer.NamespaceSelector == nil {
			if p.Namespace != ns {
				continue
			}
		} else if !selects(peer.NamespaceSelector, s.nsLabels[p.Namespace]) {
			continue
		}
		if peer.PodSelector == nil || selects(peer.PodSelector, p.Labels) {
			out = append(out, p)
		}
	}
	return out
}

func namedPort(p *corev1.Pod, name string, proto corev1.Protocol) int32 {
	for _, c := range p.Spec.Containers {
		for _, cp := range c.Ports {
			pr := cp.Protocol
			if pr == "" {
				pr = corev1.ProtocolTCP
			}
			if cp.Name == name && pr == proto {
				return cp.ContainerPort
			}
		}
	}
	return 0
}

// ports: the nft matches for a rule's ports; dst is the Pod named ports are
// looked up in. No ports at all: one empty match.
func ports(pp []netv1.NetworkPolicyPort, dst *corev1.Pod) []string {
	if len(pp) == 0 {
		return []string{""}
	}
	var out []string
	for _, p := range pp {
		proto := corev1.ProtocolTCP
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		pr := strings.ToLower(string(proto))
		switch {
		case p.Port == nil:
			out = append(out, "meta l4proto "+pr+" ")
		case p.Port.Type == intstr.String:
			if dst != nil {
				if n := namedPort(dst, p.Port.StrVal, proto); n != 0 {
					out = append(out, fmt.Sprintf("%s dport %d ", pr, n))
				}
			}
		case p.EndPort != nil:
			out = append(out, fmt.Sprintf("%s dport %d-%d ", pr, p.Port.IntVal, *p.EndPort))
		default:
			out = append(out, fmt.Sprintf("%s dport %d ", pr, p.Port.IntVal))
		}
	}
	return out
}

func named(pp []netv1.NetworkPolicyPort) bool {
	for _, p := range pp {
		if p.Port != nil && p.Port.Type == intstr.String {
			return true
		}
	}
	return false
}

// rule writes the lines that let a rule's traffic through. side is the address
// that the peers have: "saddr" for ingress, "daddr" for egress.
func (s *state) rule(w *bytes.Buffer, ns, side string, self *corev1.Pod, peers []netv1.NetworkPolicyPeer, pp []netv1.NetworkPolicyPort) {
	line := func(match string, dst *corev1.Pod) {
		for _, p := range ports(pp, dst) {
			fmt.Fprintf(w, "    %s%sreturn\n", match, p)
		}
	}
	dst := self // ingress: named ports are the selected Pod's
	if side == "daddr" {
		dst = nil
	}
	if len(peers) == 0 {
		line("", dst)
		if side == "daddr" && named(pp) {
			for _, p := range s.pods {
				line("ip daddr "+p.Status.PodIP+" ", p)
			}
		}
	}
	for _, peer := range peers {
		if b := peer.IPBlock; b != nil {
			m := "ip " + side + " " + b.CIDR + " "
			if len(b.Except) > 0 {
				m += "ip " + side + " != { " + strings.Join(b.Except, ", ") + " } "
			}
			line(m, dst)
			continue
		}
		ps := s.podsOf(ns, peer)
		if side == "daddr" && named(pp) {
			for _, p := range ps {
				line("ip daddr "+p.Status.PodIP+" ", p)
			}
			continue
		}
		if len(ps) == 0 {
			continue
		}
		ips := map[string]bool{}
		for _, p := range ps {
			ips[p.Status.PodIP] = true
		}
		line("ip "+side+" { "+strings.Join(keys(ips), ", ")+" } ", dst)
	}
}

func keys(m map[string]bool) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// types: a policy's policyTypes with the standard's defaults.
func types(p *netv1.NetworkPolicy) (ingress, egress bool) {
	if len(p.Spec.PolicyTypes) == 0 {
		return true, len(p.Spec.Egress) > 0
	}
	for _, t := range p.Spec.PolicyTypes {
		ingress = ingress || t == netv1.PolicyTypeIngress
		egress = egress || t == netv1.PolicyTypeEgress
	}
	return
}

func (s *state) render() []byte {
	var chains, in, eg bytes.Buffer
	for _, p := range s.pods {
		if p.Spec.NodeName != s.node {
			continue
		}
		ip := p.Status.PodIP
		var ci, ce bytes.Buffer
		isoIn, isoEg := false, false
		for _, np := range s.policies {
			if np.Namespace != p.Namespace || !selects(&np.Spec.PodSelector, p.Labels) {
				continue
			}
			ingress, egress := types(np)
			if ingress {
				isoIn = true
				for _, r := range np.Spec.Ingress {
					s.rule(&ci, np.Namespace, "saddr", p, r.From, r.Ports)
				}
			}
			if egress {
				isoEg = true
				for _, r := range np.Spec.Egress {
					s.rule(&ce, np.Namespace, "daddr", p, r.To, r.Ports)
				}
			}
		}
		if isoIn {
			fmt.Fprintf(&chains, "  chain in-%s { # %s/%s\n%s    counter drop\n  }\n", ip, p.Namespace, p.Name, ci.String())
			fmt.Fprintf(&in, "%s : jump in-%s, ", ip, ip)
		}
		if isoEg {
			fmt.Fprintf(&chains, "  chain eg-%s { # %s/%s\n%s    counter drop\n  }\n", ip, p.Namespace, p.Name, ce.String())
			fmt.Fprintf(&eg, "%s : jump eg-%s, ", ip, ip)
		}
	}
	var w bytes.Buffer
	fmt.Fprintf(&w, "table ip %s\ndelete table ip %s\ntable ip %s {\n%s", table, table, table, chains.String())
	w.WriteString("  chain forward {\n    type filter hook forward priority 0; policy accept;\n    ct state established,related accept\n")
	if eg.Len() > 0 {
		fmt.Fprintf(&w, "    ip saddr vmap { %s }\n", strings.TrimSuffix(eg.String(), ", "))
	}
	if in.Len() > 0 {
		fmt.Fprintf(&w, "    ip daddr vmap { %s }\n", strings.TrimSuffix(in.String(), ", "))
	}
	w.WriteString("  }\n  chain input {\n    type filter hook input priority 0; policy accept;\n    ct state established,related accept\n")
	if eg.Len() > 0 {
		fmt.Fprintf(&w, "    ip saddr vmap { %s }\n", strings.TrimSuffix(eg.String(), ", "))
	}
	w.WriteString("  }\n}\n")
	return w.Bytes()
}

func main() {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig file")
	node := flag.String("node", "", "this node's name")
	dry := flag.Bool("dry-run", false, "print the ruleset instead of loading it")
	flag.Parse()
	cfg, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		log.Fatal(err)
	}
	cfg.ContentType = "application/vnd.kubernetes.protobuf"
	f := informers.NewSharedInformerFactory(kubernetes.NewForConfigOrDie(cfg), 0)
	pods, nss, pols := f.Core().V1().Pods(), f.Core().V1().Namespaces(), f.Networking().V1().NetworkPolicies()
	dirty := make(chan struct{}, 1)
	poke := func() {
		select {
		case dirty <- struct{}{}:
		default:
		}
	}
	h := cache.ResourceEventHandlerFuncs{AddFunc: func(any) { poke() }, UpdateFunc: func(any, any) { poke() }, DeleteFunc: func(any) { poke() }}
	for _, i := range []cache.SharedIndexInformer{pods.Informer(), nss.Informer(), pols.Informer()} {
		if _, err := i.AddEventHandler(h); err != nil {
			log.Fatal(err)
		}
	}
	ctx := context.Background()
	f.Start(ctx.Done())
	f.WaitForCacheSync(ctx.Done())
	poke()
	var last []byte
	for range dirty {
		s := &state{node: *node, nsLabels: map[string]labels.Set{}}
		pl, _ := pods.Lister().List(labels.Everything())
		for _, p := range pl {
			if live(p) {
				s.pods = append(s.pods, p)
			}
		}
		sort.Slice(s.pods, func(i, j int) bool { return s.pods[i].UID < s.pods[j].UID })
		nl, _ := nss.Lister().List(labels.Everything())
		for _, n := range nl {
			s.nsLabels[n.Name] = n.Labels
		}
		s.policies, _ = pols.Lister().List(labels.Everything())
		sort.Slice(s.policies, func(i, j int) bool { return s.policies[i].UID < s.policies[j].UID })
		rules := s.render()
		if bytes.Equal(rules, last) {
			continue
		}
		if *dry {
			fmt.Printf("%s", rules)
		} else {
			c := exec.Command("nft", "-f", "-")
			c.Stdin = bytes.NewReader(rules)
			if out, err := c.CombinedOutput(); err != nil {
				log.Printf("nft: %v\n%s\n%s", err, out, rules)
				time.AfterFunc(time.Second, poke)
				continue
			}
			log.Printf("loaded %d bytes of rules for %d policies", len(rules), len(s.policies))
		}
		last = rules
		time.Sleep(100 * time.Millisecond) // gather changes
	}
}
