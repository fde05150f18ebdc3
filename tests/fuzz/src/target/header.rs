//! The header of a safetensors file. What is accepted lies inside the file and has the bytes of its shape.

use cadre_checkpoint::fuzzing;

use crate::draw::Draw;

pub(crate) fn run(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    // The length field is right unless the input wants another: random bytes would never get beyond it.
    let file = match draw.one_in(4) {
        true => draw.rest().to_vec(),
        false => {
            let header = draw.rest();
            [&(header.len() as u64).to_le_bytes()[..], header].concat()
        }
    };
    let Ok(header) = fuzzing::header(&file) else { return };
    let mut cursor = header.data_start;
    for entry in &header.entries {
        assert_eq!(entry.range.start, cursor, "no gap, no overlap");
        let elements: usize = entry.shape.iter().product();
        assert_eq!(entry.range.len(), elements * entry.dtype.bytes(), "{entry:?}");
        cursor = entry.range.end;
    }
    assert_eq!(header.file_len, cursor);
}
