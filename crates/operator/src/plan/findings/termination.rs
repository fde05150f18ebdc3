//! The last words of a process: the line `Reason: message` of its termination message (`--termination-log`), or
//! what Kubernetes knows of its end.

use cadre_k8s_api::Reason;
use k8s_openapi::api::core::v1::ContainerStateTerminated;

/// Why a container ended, if that was a fault.
pub(super) fn fault(end: &ContainerStateTerminated) -> Option<(Reason, String)> {
    let message = end.message.as_deref().unwrap_or_default().trim();
    match end.reason.as_deref() {
        Some("OOMKilled") => {
            return Some((
                Reason::OutOfMemory,
                "it was killed for using more memory than its limit".to_owned(),
            ));
        }
        Some("StartError" | "ContainerCannotRun") => {
            return Some((
                Reason::InvalidConfiguration,
                format!("its container cannot be started: {message}"),
            ));
        }
        _ => {}
    }
    if end.exit_code == 0 {
        return None;
    }
    if let Some((reason, words)) = told(message) {
        return Some((reason, words.to_owned()));
    }
    let how = match end.exit_code {
        137 => "it was killed (exit code 137)".to_owned(),
        code => format!("it ended with exit code {code}"),
    };
    let last = message.lines().rev().map(str::trim).find(|line| !line.is_empty());
    Some((Reason::PodsCrashing, last.map_or(how.clone(), |last| format!("{how}: {last}"))))
}

/// The line that our processes write. Anything else is words of somebody else.
fn told(message: &str) -> Option<(Reason, &str)> {
    let (name, words) = message.lines().next()?.split_once(": ")?;
    let reason = match name {
        "CheckpointInvalid" => Reason::CheckpointInvalid,
        "CheckpointMismatch" => Reason::CheckpointMismatch,
        "CheckpointUnreadable" => Reason::CheckpointUnreadable,
        "InsufficientMemory" => Reason::OutOfMemory,
        "AcceleratorDriverMissing" => Reason::AcceleratorDriverMissing,
        "AcceleratorNotFound" => Reason::AcceleratorNotFound,
        "AcceleratorUnsupported" => Reason::AcceleratorUnsupported,
        "AcceleratorUnsupportedByImage" => Reason::AcceleratorUnsupportedByImage,
        "AcceleratorOutOfMemory" => Reason::AcceleratorOutOfMemory,
        "InvalidConfiguration" => Reason::InvalidConfiguration,
        "Internal" => Reason::PodsCrashing,
        _ => return None,
    };
    Some((reason, words))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn end(exit_code: i32, reason: &str, message: &str) -> Option<(Reason, String)> {
        let (reason, message) = (Some(reason.to_owned()), Some(message.to_owned()));
        fault(&ContainerStateTerminated { exit_code, reason, message, ..ContainerStateTerminated::default() })
    }

    #[test]
    fn the_line_of_a_process_is_its_reason() {
        let said = "CheckpointInvalid: router: m/config.json: no n_routed_experts\n";
        assert_eq!(
            end(1, "Error", said),
            Some((Reason::CheckpointInvalid, "router: m/config.json: no n_routed_experts".into()))
        );
        for (word, reason) in [
            ("CheckpointMismatch", Reason::CheckpointMismatch),
            ("CheckpointUnreadable", Reason::CheckpointUnreadable),
            ("InsufficientMemory", Reason::OutOfMemory),
            ("AcceleratorDriverMissing", Reason::AcceleratorDriverMissing),
            ("AcceleratorNotFound", Reason::AcceleratorNotFound),
            ("AcceleratorUnsupported", Reason::AcceleratorUnsupported),
            ("AcceleratorUnsupportedByImage", Reason::AcceleratorUnsupportedByImage),
            ("AcceleratorOutOfMemory", Reason::AcceleratorOutOfMemory),
            ("InvalidConfiguration", Reason::InvalidConfiguration),
            ("Internal", Reason::PodsCrashing),
        ] {
            assert_eq!(end(1, "Error", &format!("{word}: x\n")), Some((reason, "x".into())));
        }
    }

    #[test]
    fn what_the_kernel_or_the_runtime_did_is_told_without_a_line() {
        assert_eq!(end(137, "OOMKilled", "").unwrap().0, Reason::OutOfMemory);
        assert_eq!(
            end(128, "StartError", "exec: \"router\": not found").unwrap().0,
            Reason::InvalidConfiguration
        );
        assert_eq!(
            end(101, "Error", "log line\nthread 'main' panicked: boom\n\n"),
            Some((Reason::PodsCrashing, "it ended with exit code 101: thread 'main' panicked: boom".into()))
        );
        assert_eq!(
            end(137, "Error", ""),
            Some((Reason::PodsCrashing, "it was killed (exit code 137)".into()))
        );
        assert_eq!(end(0, "Completed", "Internal: no"), None);
    }
}
