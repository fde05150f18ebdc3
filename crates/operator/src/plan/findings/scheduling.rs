//! Why the scheduler places a pod nowhere, from its message: counts of nodes by cause
//! (`0/5 nodes are available: 2 Insufficient nvidia.com/gpu, 3 node(s) didn't match Pod's node
//! affinity/selector. preemption: …`).
//!
//! Nodes that do not match the selector are most often those of others, so a lack on nodes that do match is the
//! cause to tell.

use cadre_k8s_api::Reason;

/// The reason that fits the message.
pub(super) fn reason(message: &str, accelerator: Option<&str>) -> Reason {
    let lacks = |resource: &str| {
        let mut places = message.match_indices("Insufficient ").map(|(at, word)| &message[at + word.len()..]);
        places.any(|rest| rest.strip_prefix(resource).is_some_and(ends_word))
    };
    // What preemption would not help with repeats the causes in other words.
    let causes = message.split("preemption:").next().unwrap_or(message);
    let says = |words: &str| causes.contains(words);
    if says("persistentvolumeclaim") && says("not found") {
        Reason::ClaimNotFound
    } else if says("unbound immediate PersistentVolumeClaims") {
        Reason::ClaimNotBound
    } else if accelerator.is_some_and(lacks) {
        Reason::InsufficientAccelerators
    } else if says("Insufficient ") || says("Too many pods") {
        Reason::InsufficientResources
    } else if says("node affinity/selector") || says("untolerated taint") || says("no nodes available") {
        Reason::NodeSelectorUnmatched
    } else {
        Reason::Unschedulable
    }
}

fn ends_word(rest: &str) -> bool {
    !rest.starts_with(|next: char| next.is_ascii_alphanumeric() || matches!(next, '/' | '-' | '_'))
        && !rest
            .strip_prefix('.')
            .is_some_and(|rest| rest.starts_with(|next: char| next.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedulers_words() {
        let gpu = Some("nvidia.com/gpu");
        for (message, expected) in [
            (
                "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available: 3 No \
                 preemption victims found for incoming pod.",
                Reason::InsufficientAccelerators,
            ),
            (
                "0/5 nodes are available: 2 Insufficient nvidia.com/gpu, 3 node(s) didn't match Pod's node \
                 affinity/selector.",
                Reason::InsufficientAccelerators,
            ),
            ("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.shared.", Reason::InsufficientResources),
            (
                "0/2 nodes are available: 1 Insufficient cpu, 2 Insufficient memory.",
                Reason::InsufficientResources,
            ),
            ("0/2 nodes are available: 2 Too many pods.", Reason::InsufficientResources),
            (
                "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. preemption: 0/2 nodes \
                 are available: 2 Preemption is not helpful for scheduling.",
                Reason::NodeSelectorUnmatched,
            ),
            (
                "0/1 nodes are available: 1 node(s) had untolerated taint {nvidia.com/gpu: }.",
                Reason::NodeSelectorUnmatched,
            ),
            ("no nodes available to schedule pods", Reason::NodeSelectorUnmatched),
            ("0/1 nodes are available: persistentvolumeclaim \"ds\" not found.", Reason::ClaimNotFound),
            (
                "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
                Reason::ClaimNotBound,
            ),
            ("0/1 nodes are available: 1 node(s) had volume node affinity conflict.", Reason::Unschedulable),
        ] {
            assert_eq!(reason(message, gpu), expected, "{message}");
        }
        let shared = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.shared.";
        assert_eq!(reason(shared, Some("nvidia.com/gpu.shared")), Reason::InsufficientAccelerators);
        assert_eq!(
            reason("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.", None),
            Reason::InsufficientResources
        );
    }
}
